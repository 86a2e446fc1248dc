"""All four stages on real CTs and radiographs of many formats, without any label column."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from ctx_distill.commands.main import main

pytestmark = pytest.mark.slow


def test_the_whole_run_on_real_scans(real_mini: Path, tiny_preset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["all", "--data", str(real_mini), "--run", str(run), "--preset", str(tiny_preset)]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) == {"expert", "retrieval", "distillation", "alignment", "zero_shot", "classifier", "report"}
    assert metrics["zero_shot"]["macro_auroc"] is None
    assert metrics["classifier"]["left_out"] == "the CT manifest has no label columns"
    assert metrics["retrieval"]["pool"] == 26
    truth = pd.read_csv(real_mini / "ct.csv")
    predictions = pd.read_csv(run / "zero_shot_predictions.csv")
    assert sorted(predictions["study_id"]) == sorted(truth[truth["split"] == "test"]["study_id"])
    assert predictions.drop(columns="study_id").apply(lambda column: column.between(0, 1)).all(axis=None)
    reports = pd.read_csv(run / "reports.csv", keep_default_na=False)
    assert "Right lung without a focal lesion." in set(reports["reference"])
    page = (run / "index.html").read_text()
    assert "no label columns" in page
    assert "not a medical device" in page
