"""How a prediction prints, and its plain JSON values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import ctx_distill
from ctx_distill.inference.prediction import Prediction, Saliency, ScanGrid


def prediction(findings: int = 5, *, report: str | None = "Small left effusion.") -> Prediction:
    probabilities = {f"finding {number}": (number + 1) / 10 for number in range(findings)}
    affine = np.diag([-2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = (10, 20, 30)
    scan = ScanGrid((6, 7, 8), affine)
    values = np.zeros((2, 3, 4), np.float32)
    values[1, 2, 3] = 0.5
    saliency = {"finding 1": Saliency("finding 1", values, affine, scan, "grad-cam")}
    embedding = np.linspace(-1, 1, 512, dtype=np.float32)
    return Prediction(Path("folder/scan.nii.gz"), probabilities, "classifier", {}, embedding, scan, saliency, report)


def test_the_short_form_names_the_most_probable_findings() -> None:
    assert str(prediction()) == (
        "Prediction(scan.nii.gz: finding 4 0.50, finding 3 0.40, finding 2 0.30, 2 more; saliency of finding 1;"
        " draft report of 3 words; classifier)"
    )
    assert str(prediction(0, report=None)) == "Prediction(scan.nii.gz: no findings; saliency of finding 1; classifier)"


def test_a_list_of_predictions_prints_no_array() -> None:
    text = repr([prediction(18), prediction(18)])
    assert "array" not in text
    assert len(text) < 400
    assert repr(prediction().saliency) == "{'finding 1': Saliency(finding 1: 2 x 3 x 4, grad-cam)}"


def test_to_dict_survives_json() -> None:
    plain = prediction().to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["path"] == "folder/scan.nii.gz"
    assert len(plain["embedding"]) == 512
    assert plain["scan"] == {"shape": [6, 7, 8], "affine_lps": prediction().scan.affine_lps.tolist()}
    assert plain["saliency"] == {
        "finding 1": {"method": "grad-cam", "shape": [2, 3, 4], "max": 0.5, "peak_lps_mm": [8.0, 26.0, 42.0]}
    }
    assert plain["report"] == "Small left effusion."


@pytest.mark.full
def test_a_model_returns_it(finished_run: Path, cohort: Path) -> None:
    model = ctx_distill.load(finished_run)
    result = model.predict(next(cohort.glob("ct/*.nii.gz")), saliency=True, report=True)
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["probabilities"] == result.probabilities
    np.testing.assert_array_equal(np.array(plain["embedding"], np.float32), result.embedding)
    assert "\n" not in str(result)
    assert len(str(model.predict(next(cohort.glob("ct/*.nii.gz"))))) < 200
