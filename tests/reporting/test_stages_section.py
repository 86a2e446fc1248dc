"""The pages of single stages: each stands alone, holds its stage's parts and nothing of the others, and is linked."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ctx_distill.reporting import build_page
from ctx_distill.runs.run_reader import PAGE_STAGES


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    own = tmp_path_factory.mktemp("stages") / "run"
    shutil.copytree(finished, own, ignore=shutil.ignore_patterns("index.html"))
    (own / "zero_shot").mkdir()
    (own / "align" / "request.json").write_text(
        json.dumps(
            {"key": "k3y", "inputs": {"ct": "ab" * 32, "index": "cd" * 32}, "overrides": ["--trainer.max_epochs=2"]}
        )
    )
    (own / "align" / "config.yaml").write_text("model:\n  temperature: 0.07 # <b>\n")
    build_page(own)
    return own


def parts(run: Path, folder: str) -> set[str]:
    return set(re.findall(r'<section id="(\w+)"', (run / folder / "index.html").read_text()))


def test_each_stage_has_its_own_parts(run: Path) -> None:
    assert parts(run, "expert") == {"results", "failed", "curves", "made"}
    assert parts(run, "index") == {"results", "failed", "studies", "made"}
    assert parts(run, "align") == {"results", "failed", "curves", "made"}
    assert parts(run, "zero_shot") == {"results", "failed", "findings", "roc", "wrong", "made"}
    assert parts(run, "classifier") == {"results", "failed", "findings", "curves", "roc", "wrong", "made"}
    assert parts(run, "report") == {"results", "failed", "curves", "studies", "made"}


@pytest.mark.parametrize("folder", [folder for folder, _, _ in PAGE_STAGES])
def test_a_stage_page_stands_alone_and_is_sound(run: Path, folder: str) -> None:
    html = (run / folder / "index.html").read_text()
    assert "<script" not in html
    assert not re.search(r"https?:|@import|url\(", html)
    assert html.count("<h1>") == 1
    levels = [int(level) for level in re.findall(r"<h([1-6])", html)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'<a [^>]*href="([^"]+)"', html):
        if target.startswith("#"):
            assert target[1:] in ids
        else:
            assert (run / folder / target).resolve().is_file()
    assert re.findall(r'aria-current="page">([^<]+)', html) == [
        name for place, _, name in PAGE_STAGES if place == folder
    ]
    for label in re.findall(r'for="([^"]+)"', html):
        assert label in ids


def test_the_run_page_links_them(run: Path) -> None:
    html = (run / "index.html").read_text()
    for folder, _, _ in PAGE_STAGES:
        assert f'href="{folder}/index.html"' in html


def test_results_are_the_stages_alone(run: Path) -> None:
    html = (run / "align/index.html").read_text()
    assert "0.340 [0.280, 0.390]" in html
    assert "0.780 [0.720, 0.830]" not in html  # zero-shot's
    assert "k3y" in html
    assert "--trainer.max_epochs=2" in html
    assert "cdcdcdcdcdcd" in html
    assert "temperature: 0.07 # &lt;b&gt;" in html


def test_pictures_where_they_apply(run: Path) -> None:
    index, report = ((run / folder / "index.html").read_text() for folder in ("index", "report"))
    assert "not a frontal view: 2; patient is in CT val or test: 1" in index
    assert index.count("<article") == report.count("<article") == 6
    assert index.count('aria-label="Retrieved X-ray"') == 6
    assert 'aria-label="Generated report"' not in index
    assert 'aria-label="Retrieved X-ray"' not in report
    assert report.count('aria-label="Generated report"') == 6


def test_a_stage_alone(make_run: Callable[..., Path]) -> None:
    """A run folder that holds one stage, broken off."""
    import shutil

    run = make_run()
    for place in run.iterdir():
        if place.name not in ("run.json", "expert"):
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    build_page(run)
    html = (run / "expert/index.html").read_text()
    assert "Running or interrupted" in html
    assert not (run / "align").exists()  # a page makes no stage's folder
    assert 'href="align/index.html"' not in (run / "index.html").read_text()
