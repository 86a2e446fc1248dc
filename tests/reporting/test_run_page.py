"""The page as a whole: its structure, that it stands alone, and what it does about missing parts."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from ctx_distill.reporting import build_page
from ctx_distill.types import InputError

VOID = {"meta", "link", "img", "br", "line", "rect", "circle", "polyline", "polygon"}


class Page(HTMLParser):
    """Parsed page: checks nesting, keeps tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html(finished: Path) -> str:
    path = build_page(finished)
    assert path == finished / "index.html"
    assert not list(finished.glob(".*.part"))
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_it_is_a_sound_document(html: str, page: Page) -> None:
    assert html.lstrip().startswith("<!DOCTYPE html>")
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [attributes["href"] for attributes in page.all("a")]
    assert {target[1:] for target in targets if target.startswith("#")} <= set(ids)
    assert all(attributes.get("alt") for attributes in page.all("img"))
    plots = [attributes for attributes in page.all("svg") if attributes.get("aria-hidden") != "true"]
    assert plots
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in plots)
    assert all("scope" in attributes for attributes in page.all("th"))


def test_it_stands_alone(html: str, page: Page) -> None:
    assert not re.search(r"https?:", html)
    assert "@import" not in html
    assert "url(" not in html
    assert not page.all("script")
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "poster"):
            if name in attributes:
                linked = tag == "a" and re.fullmatch(r"#[\w-]+|\w+/index\.html", attributes[name])
                assert linked or attributes[name].startswith("data:"), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert len(html) < 6e6


def test_it_says_what_it_is_and_shows_the_numbers(page: Page) -> None:
    assert "Research tool, not a medical device" in page.text
    assert "0.780 [0.720, 0.830]" in page.text  # the table
    assert "95 % interval 0.720 to 0.830" in page.text  # the tile
    assert "3.6 times a random X-ray's 0.170" in page.text
    assert "cardiomegaly" in page.text
    assert "not a frontal view 2" in page.text
    assert "Apache-2.0" in page.text
    assert "1 min 21 s" in page.text
    assert "Not on this page" not in page.text
    assert len(page.all("article")) == 6
    assert len(page.all("img")) == 6 * 5


def test_plots_are_there(page: Page) -> None:
    labels = [attributes.get("aria-label", "") for attributes in page.all("svg")]
    assert sum(label.startswith("ROC curve of") for label in labels) == 6
    assert sum(label.startswith("loss by epoch") for label in labels) == 5
    assert any(label.startswith("AUROC of 5 findings with 95 % intervals") for label in labels)


def test_the_same_run_gives_the_same_bytes(finished: Path, html: str) -> None:
    assert build_page(finished).read_text(encoding="utf-8") == html


def test_what_comes_from_data_is_escaped(make_run: Callable[..., Path]) -> None:
    run = make_run()
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)"> "\'&amp;'
    info = json.loads((run / "run.json").read_text())
    data = run.parent / "evil"
    data.mkdir()
    source = Path(info["ct"]["path"]).parent
    for kind in ("ct", "xray"):
        frame = pd.read_csv(source / f"{kind}.csv")
        frame["findings"] = evil
        frame["study_id"] = frame["study_id"] + "<b onclick=x>"
        frame = frame.rename(columns={"label:cardiomegaly": "label:<u>heart</u>"})
        frame["image_path"] = [f"{kind}/{'<i>' * (kind == 'ct')}{i}.nii.gz" for i in range(len(frame))]
        frame.to_csv(data / f"{kind}.csv", index=False)
        info[kind]["path"] = str(data / f"{kind}.csv")
    info |= {"preset": evil, "command": evil, "expert": {"name": evil, "license": evil}}
    (run / "run.json").write_text(json.dumps(info))
    for path in ("zero_shot_predictions.csv", "reports.csv", "index/retrieval.csv"):
        frame = pd.read_csv(run / path).rename(columns={"cardiomegaly": "<u>heart</u>"})
        for column in ("study_id", "xray_image_id"):
            if column in frame:
                frame[column] = frame[column] + "<b onclick=x>"
        if "generated" in frame:
            frame["generated"] = frame["reference"] = evil
        frame.to_csv(run / path, index=False)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["zero_shot"]["per_finding"] = {"<u>heart</u>": 0.6}
    metrics["alignment"][evil] = 0.5
    (run / "metrics.json").write_text(json.dumps(metrics))
    log = pd.read_csv(run / "align/logs/metrics.csv").rename(columns={"train/pair": "train/<u>pair"})
    log.to_csv(run / "align/logs/metrics.csv", index=False)

    page = Page(build_page(run).read_text(encoding="utf-8"))
    assert not page.all("script") + page.all("u") + page.all("b") + page.all("i")
    assert not [tag for tag, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert "<script>alert(1)</script>" in page.text
    assert "The CT could not be shown" in page.text


def test_without_labels(make_run: Callable[..., Path]) -> None:
    page = Page(build_page(make_run(labels=False)).read_text(encoding="utf-8"))
    assert "This cohort has no label columns: label-based scores are missing." in page.text
    assert "skipped: no label columns" in page.text
    assert "Classifier skipped" in page.text
    assert not [a for a in page.all("svg") if a.get("aria-label", "").startswith("ROC")]
    assert "Truth" not in page.text
    assert "Report to volume, recall@5 0.340" in page.text
    assert len(page.all("article")) == 6


def test_an_empty_run_folder(tmp_path: Path) -> None:
    page = Page(build_page(tmp_path).read_text(encoding="utf-8"))
    assert "No stage has written its metrics yet." in page.text
    assert "Not run yet: X-ray expert, Retrieval index, Distillation" in page.text
    assert "CT manifest could not be read" in page.text


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run folder"):
        build_page(tmp_path / "nowhere")


def test_midway(make_run: Callable[..., Path]) -> None:
    """Stage 3 is under way: metrics are only in the stages' folders, later files are not there yet."""
    run = make_run()
    metrics = json.loads((run / "metrics.json").read_text())
    for folder, key in (("expert", "expert"), ("index", "retrieval"), ("distill", "distillation")):
        (run / folder / "metrics.json").write_text(json.dumps(metrics[key]))
    for name in ("metrics.json", "zero_shot_predictions.csv", "reports.csv"):
        (run / name).unlink()
    (run / "classifier/predictions.csv").unlink()
    for folder in ("classifier", "report"):
        (run / folder / "logs/metrics.csv").unlink()
        (run / folder / "logs").rmdir()
        (run / folder).rmdir()
    page = Page(build_page(run).read_text(encoding="utf-8"))
    assert "Running or interrupted: Robust alignment." in page.text
    assert "Not run yet: Zero-shot, Classifier, Report decoder." in page.text
    assert "0.610 [0.550, 0.660]" in page.text
    assert "selected at even intervals from the sorted test studies" in page.text
    assert "No report was generated" in page.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.json", '{"zero_shot": {"macro'),
        ("metrics.json", "[1, 2]"),
        (
            "metrics.json",
            '{"zero_shot": {"macro_auroc": {"value": null, "low": null, "high": null}, "per_finding": 3}}',
        ),
        ("run.json", '{"ct": {"path": "gone/ct.csv"}, "stages": [], "expert": null, "volume_spec": {"window": "x"}}'),
        ("reports.csv", "study_id,reference\na,b\n"),
        ("zero_shot_predictions.csv", ""),
        ("zero_shot_predictions.csv", "study_id\n"),
        ("zero_shot_predictions.csv", "study_id,cardiomegaly\nct010,\nother,0.3\n"),
        ("index/retrieval.csv", "study_id,rank,xray_image_id,similarity\nct010,1,nobody,0.5\n"),
        ("align/logs/metrics.csv", "epoch,step,train/loss\n0,0,nan\n"),
        ("align/logs/metrics.csv", 'epoch,step\n"0'),
    ],
)
def test_half_written_and_odd_files_do_not_break_it(make_run: Callable[..., Path], name: str, content: str) -> None:
    run = make_run()
    (run / name).write_text(content)
    info = json.loads((run / "run.json").read_text())
    if name != "run.json":  # without the scans, to be quick
        info["ct"]["path"] = str(Path(info["ct"]["path"]).with_name("unscanned.csv"))
        frame = pd.read_csv(Path(info["ct"]["path"]).with_name("ct.csv"))
        frame.assign(image_path="none.nii.gz").to_csv(info["ct"]["path"], index=False)
        (run / "run.json").write_text(json.dumps(info))
    Page(build_page(run).read_text(encoding="utf-8"))


def test_colours_have_contrast() -> None:
    """Text at least 4.5 to 1 on its ground, plot colours at least 3 to 1, light and dark."""
    import ctx_distill.reporting.run_page as module

    style = (module.TEMPLATES / "style.css").read_text()

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    palettes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)]
    assert len(palettes) == 3
    for palette in palettes:
        for ground in ("paper", "panel", "mark"):
            assert contrast(palette["ink"], palette[ground]) >= 4.5
        for words in ("quiet", "link"):
            assert contrast(palette[words], palette["paper"]) >= 4.5
        for mark in ("s0", "s1"):
            assert contrast(palette[mark], palette["paper"]) >= 3


def test_generated_reports_stand_beside_their_baselines(make_run: Callable[..., Path]) -> None:
    run = make_run()
    path = run / "metrics.json"
    metrics = json.loads(path.read_text())
    said = "The decoder does not beat its baselines. Beside the nearest training report it is not better."
    metrics["report"] |= {"verdict": said, "baselines": {"nearest": {"bleu4": 0.456}, "frequent": {"rouge_l": 0.123}}}
    path.write_text(json.dumps(metrics))
    page = Page(build_page(run).read_text())
    assert said in page.text
    table = page.text.partition("Most frequent training report")[2]
    assert "BLEU-4 0.310" in table
    assert "0.456 –" in table.partition("BLEU-4")[2][:60]
    assert "– 0.123" in table.partition("ROUGE-L")[2][:60]
