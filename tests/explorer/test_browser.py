"""The explorer in a real headless Chromium, from upload to result, against `load().predict_volume` of the same scan."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explorer_scans import dicom_zip

import ctx_distill
from ctx_distill.data.io.volume import read_volume
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.explorer import viewer
from ctx_distill.inference.model import CTModel

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium")
SECONDS = 120_000
if not os.environ.get("CI"):
    missing = [
        what
        for what, there in (("chromium", CHROMIUM), ("NiiVue (make explorer)", viewer.NIIVUE.is_file()))
        if not there
    ]
    if missing:
        pytest.skip(f"not here: {', '.join(missing)}", allow_module_level=True)


@pytest.fixture(scope="module")
def model(finished_run: Path) -> CTModel:
    return ctx_distill.load(finished_run)


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A page; whatever it logs as an error, asks of another host, or is refused by its policy, fails the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else wrong.append(r.url))
    page.goto(address)
    page.wait_for_selector("#where:not(:empty)")
    yield page
    page.close()
    assert not wrong


def opened(page: Any, file: Any) -> None:
    page.set_input_files("#file", file)
    page.wait_for_selector("body[data-ready]", timeout=SECONDS)
    assert page.get_attribute("body", "data-ready") == "scan"


def dropped(page: Any, path: Path) -> None:
    """A file from outside dragged over the page and let go there, by the browser's own events."""
    box = page.locator("#drop").bounding_box()
    session = page.context.new_cdp_session(page)
    where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver"):
        session.send("Input.dispatchDragEvent", {"type": kind, "data": data, **where})
    page.wait_for_selector("#drop.over-it")
    session.send("Input.dispatchDragEvent", {"type": "drop", "data": data, **where})
    page.wait_for_selector("body[data-ready=scan]", timeout=SECONDS)


def rows_shown(page: Any) -> list[tuple[str, str]]:
    """(finding, score) of each row, in order."""
    names = page.eval_on_selector_all("#findings th", "all => all.map(one => one.firstChild.textContent)")
    return list(zip(names, page.locator("#findings .num").all_inner_texts(), strict=True))


def expected(model: CTModel, path: Path) -> list[tuple[str, str]]:
    values = model.predict_volume(read_volume(path)).probabilities
    return [(name, f"{value:.2f}") for name, value in sorted(values.items(), key=lambda item: -item[1])]


def pixels(page: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The canvas as the browser shows it."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(page.locator("#canvas").screenshot())).convert("RGB"))


def coloured(page: Any) -> float:
    """Share of the canvas that is not grey."""
    return float((np.ptp(pixels(page).astype(int), axis=2) > 60).mean())


def same(shown: list[tuple[str, str]], wanted: list[tuple[str, str]]) -> None:
    assert dict(shown).keys() == dict(wanted).keys()
    # The second decimal may round otherwise in another process.
    for name, value in wanted:
        assert abs(float(dict(shown)[name]) - float(value)) < 0.011, name
    assert [float(value) for _, value in shown] == sorted((float(value) for _, value in shown), reverse=True)


def test_a_phantom_from_upload_to_result(page: Any, model: CTModel, cohort: Path, scratch: Path) -> None:
    manifest = read_manifest(cohort / "ct.csv").split("test")
    scan = manifest.image_file(manifest.frame.index[0])
    dropped(page, scan)
    same(rows_shown(page), expected(model, scan))
    # The planes hold tissue and air: grey of many values, in each third of the canvas's width.
    picture = pixels(page)
    for third in np.array_split(picture, 3, axis=1):
        assert len(np.unique(third[..., 0])) > 30
    said = model.predict(scan, report=True)
    assert page.inner_text("#report") == (said.report or "The generated report is empty.")
    near = model.nearest(said, 6)
    titles = page.locator("#near h3").all_inner_texts()
    assert titles == [f"{n + 1}. Similarity {one.similarity:.2f} · {one.study_id}" for n, one in enumerate(near)]
    assert near[0].report in page.locator("#near li").first.inner_text()
    assert page.eval_on_selector_all("#near img", "all => all.every(one => one.naturalWidth > 50)")
    assert "research tool" in page.inner_text("header")

    # A finding's place: the overlay is drawn in colour, and goes again.
    grey = coloured(page)
    assert grey < 0.05  # the cross-hairs alone
    page.locator("#findings button").first.click()
    page.wait_for_selector("body[data-shown]")
    page.wait_for_timeout(300)
    assert page.inner_text("#overlay-name") == rows_shown(page)[0][0]
    assert coloured(page) > grey + 0.02
    page.click("#hide")
    page.wait_for_timeout(300)
    assert coloured(page) < grey + 0.02
    # A window and a plane by keyboard alone.
    before = pixels(page)
    page.focus("[data-window=soft]")
    page.keyboard.press("Enter")
    page.wait_for_timeout(200)
    assert page.get_attribute("[data-window=soft]", "aria-pressed") == "true"
    soft = pixels(page)
    assert (before != soft).mean() > 0.05
    readout = page.inner_text("#readout")
    page.focus("#axial")
    for _ in range(60):
        page.keyboard.press("ArrowRight")
    page.wait_for_timeout(200)
    assert page.inner_text("#readout") != readout

    # At the end nothing of the scan is left, on the page or on the disk.
    assert list(scratch.glob("ctx-distill-explorer-*/*"))
    page.click("#end")
    page.wait_for_selector("#start:not([hidden])")
    page.wait_for_timeout(300)
    assert not list(scratch.glob("ctx-distill-explorer-*/*"))


def test_a_zip_of_dicom_gives_what_its_scan_gives(page: Any, model: CTModel, cohort: Path, scratch: Path) -> None:
    manifest = read_manifest(cohort / "ct.csv")
    scan = manifest.image_file(manifest.frame.index[0])
    volume = read_volume(scan)
    content = dicom_zip(volume.voxels.astype(np.int16), volume.spacing)
    folder = scratch / "slices"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(folder)
    opened(page, {"name": "series.zip", "mimeType": "application/zip", "buffer": content})
    same(rows_shown(page), expected(model, folder / "study"))
    assert "series.zip · DICOM" in page.inner_text("#told")
    # Who closes the page ends the session.
    assert list(scratch.glob("ctx-distill-explorer-*/*"))
    page.goto("about:blank")
    page.wait_for_timeout(1000)
    assert not list(scratch.glob("ctx-distill-explorer-*/*"))


def test_a_real_scan(page: Any, model: CTModel, real_mini: Path) -> None:
    scan = real_mini / "ct" / "totalseg_aortic_dissection.nii.gz"
    opened(page, str(scan))
    same(rows_shown(page), expected(model, scan))
    assert "233 × 167 × 191 voxels of 1.5 × 1.5 × 1.5 mm" in page.inner_text("#told")
    assert len(np.unique(pixels(page)[..., 0])) > 100


def test_a_refusal_is_told_and_another_scan_can_be_opened(page: Any) -> None:
    page.set_input_files(
        "#file", {"name": "letter.nii.gz", "mimeType": "application/gzip", "buffer": b"not a supported scan"}
    )
    page.wait_for_selector("#refusal:not([hidden])", timeout=SECONDS)
    assert page.inner_text("#reason").startswith("letter.nii.gz: not a supported scan")
    page.click("#again")
    assert page.is_visible("#drop")


def test_it_fits_a_telephone_and_names_its_controls(page: Any, cohort: Path) -> None:
    page.set_viewport_size({"width": 400, "height": 850})
    opened(page, str(next((cohort / "ct").glob("*.nii.gz"))))
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    unnamed = page.evaluate(
        """[...document.querySelectorAll("button, input, canvas, section")].filter(one => {
             const label = one.getAttribute("aria-label") || one.labels?.[0]?.innerText || one.textContent;
             return !label?.trim() && !document.getElementById(one.getAttribute("aria-labelledby"));
           }).map(one => one.outerHTML)"""
    )
    assert not [one for one in unnamed if 'role="alert"' not in one]
