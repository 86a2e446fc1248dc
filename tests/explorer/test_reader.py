"""The explorer's reader on a whole run: what it says, what it may show, and what does not belong together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest

import ctx_distill
from ctx_distill.data.io.volume import read_volume
from ctx_distill.errors import InputError
from ctx_distill.explorer.model_reader import open_reader
from ctx_distill.explorer.reader_settings import ReaderSettings

pytestmark = pytest.mark.full


def test_it_answers_as_load_does_and_hides_the_pool(finished_run: Path, cohort: Path) -> None:
    path = next((cohort / "ct").glob("*.nii.gz"))
    scan, steps = read_volume(path), []
    answer = open_reader(ReaderSettings(finished_run, device="cpu")).read(scan, steps.append)
    said = ctx_distill.load(finished_run).predict(path, report=True)
    assert {one.name: one.value for one in answer.findings} == pytest.approx(said.probabilities, abs=1e-6)
    assert answer.report == said.report
    assert steps == ["encoding", "saliency"]
    assert answer.neighbours is not None
    assert [(one.study_id, one.report, one.picture) for one in answer.neighbours] == [(None, None, None)] * 6


def test_the_pool_is_shown_when_told_to(finished_run: Path, cohort: Path) -> None:
    settings = ReaderSettings(finished_run, finished_run / "index" / "artefact", show_reports=True, device="cpu")
    reader = open_reader(settings)
    answer = reader.read(read_volume(next((cohort / "ct").glob("*.nii.gz"))), lambda step: None)
    table = pd.read_csv(cohort / "xray.csv", dtype=str, keep_default_na=False).set_index("study_id")
    assert answer.neighbours is not None
    for one in answer.neighbours:
        assert one.study_id is not None
        assert one.report is not None
        assert table.at[one.study_id, "findings"] in one.report
        assert one.picture is not None
        assert one.picture.startswith(b"\x89PNG")


def test_an_index_of_another_expert_is_refused_when_asked_for(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctx_distill.retrieval import store

    opened = store.XrayIndexArtefact.open
    monkeypatch.setattr(
        store.XrayIndexArtefact, "open",
        lambda *given, **named: dataclasses.replace(opened(*given, **named), expert_fingerprint="other"),
    )  # fmt: skip
    with pytest.raises(InputError, match="X-ray expert of"):
        open_reader(ReaderSettings(finished_run, finished_run / "index", device="cpu"))
    # The run's own is left out, and the page says why.
    reader = open_reader(ReaderSettings(finished_run, device="cpu"))
    assert reader.nearest is None
    assert reader.about.facts["X-ray index"].startswith("not used. the X-ray expert of")


def test_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Run `ctx-distill align`"):
        open_reader(ReaderSettings(tmp_path))
