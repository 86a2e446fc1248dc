"""Every page in a real Chromium: accessibility (axe-core), colours, no scripts, no requests, and print."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image

from ctx_distill.commands.main import main
from ctx_distill.explorer import viewer
from ctx_distill.reporting.ablation_page import build_ablation_page

pytestmark = pytest.mark.browser
AXE = Path(__file__).parent / "axe" / "node_modules" / "axe-core" / "axe.min.js"
SECONDS = 120_000
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
SERIES = 6
if not os.environ.get("CI"):
    wanted = {"chromium": shutil.which("chromium"), "NiiVue (make explorer)": viewer.NIIVUE.is_file(),
              "axe-core (make test-browser)": AXE.is_file()}  # fmt: skip
    if missing := [what for what, there in wanted.items() if not there]:
        pytest.skip(f"not here: {', '.join(missing)}", allow_module_level=True)


@pytest.fixture(scope="session")
def pages(finished_run: Path, cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each page: of a run, of one under way, of six runs beside each other, of a check, of an ablation."""
    root = tmp_path_factory.mktemp("pages")
    for name in ("run", *(f"other{n}" for n in range(SERIES - 1))):
        shutil.copytree(finished_run, root / name)
    rng = np.random.default_rng(0)
    for number in range(SERIES - 1):  # the others say something else of each study
        for table in ("zero_shot_predictions.csv", "classifier/predictions.csv"):
            path = root / f"other{number}" / table
            frame = pd.read_csv(path, dtype={"study_id": str})
            values = frame.columns[1:]
            frame[values] = (frame[values] + rng.normal(0, 0.1, frame[values].shape)).clip(0, 1)
            frame.to_csv(path, index=False)
    unfinished = root / "unfinished"
    shutil.copytree(finished_run, unfinished, ignore=shutil.ignore_patterns("report*", "classifier", "metrics.json"))
    for name in ("run", "unfinished"):
        assert main(["page", "--run", str(root / name)]) == 0
    compared = [str(root / name) for name in ("run", *(f"other{n}" for n in range(SERIES - 1)))]
    assert main(["compare", *compared, "--out", str(root / "compare.html")]) == 0
    assert main(["check", str(cohort / "ct.csv"), "--out", str(root / "check")]) == 0
    rows = [["arm", "AUROC"], ["whole", "0.71 [0.65, 0.77]"], ["without", "0.69 [0.63, 0.75]"]]
    (root / "ablation").mkdir()
    ablation = build_ablation_page(root / "ablation", {"seeds": "3"}, [("Parts", "", rows), ("Baselines", "", rows)])
    return {
        "run": root / "run" / "index.html", "unfinished": root / "unfinished" / "index.html",
        "compare": root / "compare.html", "check": root / "check" / "index.html", "ablation": ablation,
    }  # fmt: skip


NAMES = ("run", "unfinished", "compare", "check", "ablation")


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page; it may ask for nothing but itself and log no error."""
    contexts, wrong = [], []

    def open_page(path: Path, **settings: Any) -> Any:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        address = path.resolve().as_uri()
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: None if r.url == address or r.url.startswith("data:") else wrong.append(r.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def violations(page: Any) -> list[str]:
    """What axe-core finds against WCAG 2.1 A and AA, everything that is folded away unfolded."""
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    page.evaluate(AXE.read_text(encoding="utf-8") + "\n;0")
    found = page.evaluate("rules => axe.run(document, {runOnly: {type: 'tag', values: rules}})", RULES)
    assert len(found["passes"]) > 8  # that it looked
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in found["violations"]
        for node in one["nodes"][:5]
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("look", ["light", "dark", "print"])
def test_axe_finds_nothing(opened: Callable[..., Any], pages: dict[str, Path], name: str, look: str) -> None:
    page = opened(pages[name], color_scheme="dark" if look == "dark" else "light")
    if look == "print":
        page.emulate_media(media="print")
    assert not violations(page)


def test_axe_would_find_something(opened: Callable[..., Any], pages: dict[str, Path]) -> None:
    page = opened(pages["run"])
    page.evaluate("document.querySelector('.film img').removeAttribute('alt')")
    page.evaluate("document.querySelector('.lead').style.color = '#bbb'")
    assert {line.partition(":")[0] for line in violations(page)} == {"image-alt", "color-contrast"}


def test_axe_finds_nothing_in_the_explorer(browser: Any, address: str, cohort: Path) -> None:
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        page.goto(address)
        page.wait_for_selector("#where:not(:empty)")
        assert not violations(page), scheme
        page.set_input_files("#file", str(next((cohort / "ct").glob("*.nii.gz"))))
        page.wait_for_selector("body[data-ready=scan]", timeout=SECONDS)
        assert not violations(page), scheme
        page.locator("#findings button").first.click()
        page.wait_for_selector("body[data-shown]")
        assert not violations(page), scheme
        page.click("#end")
        page.wait_for_selector("#start:not([hidden])")
        page.close()


@pytest.mark.parametrize("name", ["run", "compare"])
def test_text_and_tables_are_there_without_scripts(
    opened: Callable[..., Any], pages: dict[str, Path], name: str
) -> None:
    scripted, plain = (opened(pages[name], java_script_enabled=on).inner_text("main") for on in (True, False))
    assert plain == scripted
    page = opened(pages[name], java_script_enabled=False)
    assert page.locator("table:visible").count() >= 3
    assert page.locator("svg.plot:visible").count() >= 3
    assert page.locator("script").count() == 0
    assert "Macro AUROC" in plain


def test_a_page_can_load_nothing(browser: Any, pages: dict[str, Path]) -> None:
    """The policy itself holds: what is put into the page afterwards is refused, and reaches nobody."""
    page = browser.new_page()
    page.goto(pages["run"].resolve().as_uri())
    answered: list[str] = []
    page.on("response", lambda response: answered.append(response.url))
    page.evaluate(
        """() => { window.refused = [];
          document.addEventListener('securitypolicyviolation', one => window.refused.push(one.effectiveDirective));
          const image = new Image(); image.src = 'http://127.0.0.1:9/x.png'; document.body.append(image);
          const script = document.createElement('script'); script.src = 'http://127.0.0.1:9/x.js';
          document.body.append(script);
          fetch('http://127.0.0.1:9/x').catch(() => 0); }"""
    )
    page.wait_for_function("window.refused.length >= 3")
    refused = {one.removesuffix("-elem") for one in page.evaluate("window.refused")}
    assert refused == {"img-src", "script-src", "connect-src"}
    assert not answered
    page.close()


@pytest.mark.parametrize("name", NAMES)
def test_it_prints_on_pages_and_nothing_is_cut_off(
    opened: Callable[..., Any], pages: dict[str, Path], name: str
) -> None:
    page = opened(pages[name])
    content = page.pdf(format="A4", print_background=True, prefer_css_page_size=True)
    assert content.startswith(b"%PDF")
    count = content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") + content.count(b"/Type/Page/")
    assert count > 1 or name in ("ablation", "check")
    # A4 less the margins of 15 mm: 180 mm at 96 dots an inch.
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 680, "height": 1000})
    wide = page.evaluate(
        """() => [...document.querySelectorAll('body *')].filter(one => one.getBoundingClientRect().right > 682
             && getComputedStyle(one).position !== 'absolute').map(one => one.outerHTML.slice(0, 120))"""
    )
    assert not wide[:5]


# Viénot, Brettel and Mollon 1999 for protanopia and deuteranopia, Machado, Oliveira and Fernandes 2009 (severity 1) for
# tritanopia; both on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    "deuteranopia": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
APART = 8.0
"""CIELAB distance (1976); 2.3 is just noticeable."""


def lab(rgb: Sequence[float], kind: str) -> NDArray[np.float64]:
    """CIELAB (D65) of an sRGB colour, 0 to 255, as it is seen with that colour blindness."""
    linear = np.asarray(rgb, dtype=float) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    linear = (np.asarray(BLINDNESS[kind]) @ linear).clip(0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = xyz / np.array([0.9505, 1.0, 1.089])
    f = np.where(f > (6 / 29) ** 3, np.cbrt(f), f / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_the_distance_is_that_of_known_colours() -> None:
    """White, black and sRGB's red as published; grey stays grey for everybody."""
    np.testing.assert_allclose(lab((255, 255, 255), "none"), (100, 0, 0), atol=0.05)
    np.testing.assert_allclose(lab((255, 0, 0), "none"), (53.24, 80.09, 67.20), atol=0.1)
    for kind in BLINDNESS:
        np.testing.assert_allclose(lab((128, 128, 128), kind)[1:], (0, 0), atol=0.5)


@pytest.mark.parametrize("look", ["light", "dark", "print"])
def test_series_stay_apart_for_the_colour_blind(opened: Callable[..., Any], pages: dict[str, Path], look: str) -> None:
    page = opened(pages["compare"], color_scheme="dark" if look == "dark" else "light")
    if look == "print":
        page.emulate_media(media="print")
    drawn = page.evaluate(
        """count => [...Array(count).keys()].map(n => {
             const line = document.querySelector(`.legend .curve.s${n}`), mark = document.querySelector(`.legend .mark.s${n}`);
             const style = getComputedStyle(line), other = getComputedStyle(mark);
             const shape = [mark.tagName, mark.getAttribute('points')?.split(' ').length, mark.classList.contains('open')].join();
             const fill = other.fill === 'none' ? other.stroke : other.fill;
             return {line: style.stroke, dash: style.strokeDasharray, mark: fill, shape};
           })""",
        SERIES,
    )
    assert len({one["dash"] for one in drawn}) == SERIES
    assert len({one["shape"] for one in drawn}) == SERIES
    assert [one["line"] for one in drawn] == [one["mark"] for one in drawn]
    colours = [tuple(int(part) for part in one["line"].strip("rgb()").split(",")) for one in drawn]
    for kind in BLINDNESS:
        for (i, one), (j, other) in combinations(enumerate(colours), 2):
            assert np.linalg.norm(lab(one, kind) - lab(other, kind)) > APART, (kind, i, j)


@pytest.mark.parametrize("kind", ["protanopia", "deuteranopia", "tritanopia", "achromatopsia"])
def test_the_two_series_of_a_run_differ_as_chromium_shows_them(
    opened: Callable[..., Any], pages: dict[str, Path], kind: str
) -> None:
    """Chromium's own simulation: the two keys of a legend, pixel for pixel, differ by more than their shape's edge."""
    page = opened(pages["run"])
    session = page.context.new_cdp_session(page)
    session.send("Emulation.setEmulatedVisionDeficiency", {"type": kind})
    keys = page.locator("#curves .legend .key")
    shown = [np.asarray(Image.open(io.BytesIO(keys.nth(n).screenshot())).convert("L"), dtype=float) for n in (0, 1)]
    height, width = (min(size) for size in zip(*(one.shape for one in shown), strict=True))
    assert (np.abs(shown[0][:height, :width] - shown[1][:height, :width]) > 25).mean() > 0.1
