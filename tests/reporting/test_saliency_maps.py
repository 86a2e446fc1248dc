"""`RUN/saliency/` of a whole run: maps on the scans' own voxels, made once, thrown away with their model; val's thresholds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import confusion_matrix, roc_curve

import ctx_distill
from ctx_distill.reporting import build_page
from ctx_distill.reporting.saliency_maps import write_saliency

pytestmark = pytest.mark.full


def listed(run: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads((run / "saliency" / "saliency.json").read_text())["maps"]
    return found


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "tiny"))


def test_maps_lie_on_the_scans_voxels_and_hold_what_the_model_says(finished_run: Path, cohort: Path) -> None:
    frame = pd.read_csv(cohort / "ct.csv").drop_duplicates("study_id").set_index("study_id")  # the first reconstruction
    maps = listed(finished_run)
    assert {one["model"] for one in maps} == {"zero_shot", "classifier"}
    assert {one["study_id"] for one in maps} <= set(frame.index[frame["split"] == "test"])
    for one in maps:
        image = nib.load(finished_run / "saliency" / one["file"])
        scan = nib.load(cohort / frame.at[one["study_id"], "image_path"])
        assert image.shape == scan.shape
        np.testing.assert_allclose(image.affine, scan.affine, atol=1e-3)
        assert np.asarray(image.dataobj).min() >= 0
    one = next(one for one in maps if one["model"] == "classifier")
    path = cohort / frame.at[one["study_id"], "image_path"]
    told = ctx_distill.load(finished_run).predict(path, saliency=[one["finding"]]).saliency[one["finding"]]
    image = nib.load(finished_run / "saliency" / one["file"])
    np.testing.assert_allclose(np.asarray(image.dataobj), told.on_scan().T, rtol=1e-4, atol=1e-7)
    assert one["method"] == told.method


def test_they_are_made_once_and_go_with_their_model(run: Path) -> None:
    before = {one["file"]: (run / "saliency" / one["file"]).stat().st_mtime_ns for one in listed(run)}
    assert write_saliency(run) == (len(before), 0)
    assert {name: (run / "saliency" / name).stat().st_mtime_ns for name in before} == before
    lost = sorted(before)[0]
    (run / "saliency" / lost).unlink()
    assert write_saliency(run) == (len(before), 1)
    assert (run / "saliency" / lost).is_file()

    record = run / "saliency" / "saliency.json"
    told = json.loads(record.read_text())
    for one in told["maps"]:
        one["fingerprint"] = "of another model"
    record.write_text(json.dumps(told))
    assert write_saliency(run) == (len(before), len(before))

    shutil.rmtree(run / "classifier" / "artefact")
    write_saliency(run)
    assert {one["model"] for one in listed(run)} == {"zero_shot"}
    assert not list((run / "saliency" / "classifier").rglob("*.nii.gz"))


def test_the_page_shows_them(run: Path) -> None:
    for stage in ("expert", "index", "distill", "align", "zero_shot", "classifier", "report"):
        assert (run / stage / "index.html").is_file()  # `all` wrote them
    build_page(run)
    html = (run / "index.html").read_text()
    heat = html.count('class="heat"')
    assert heat > 0
    assert '<input type="checkbox" class="heat-switch"' in html
    assert "<script" not in html
    assert len(html) < 4e6
    shutil.rmtree(run / "saliency")
    build_page(run)
    html = (run / "index.html").read_text()
    assert html.count('class="heat"') == 0
    assert "heat-switch" not in html.partition("</style>")[2]


def test_the_classifiers_thresholds_are_those_of_val(finished_run: Path, cohort: Path) -> None:
    """Against scikit-learn's ROC curve of what the loaded model says of the `val` scans, and its confusion matrix of `test`."""
    metrics = json.loads((finished_run / "classifier" / "metrics.json").read_text())
    images = pd.read_csv(cohort / "ct.csv")
    images = images[images["split"].isin(["val", "test"])].set_index("study_id")
    frame = images[~images.index.duplicated()]
    model = ctx_distill.load(finished_run)
    shown = images[images["split"] == "val"]
    answers = [model.predict(cohort / path).probabilities for path in shown["image_path"]]
    said = pd.DataFrame(answers, index=shown.index).groupby(level=0, sort=False).mean()  # over reconstructions
    val = frame.loc[said.index]
    predictions = pd.read_csv(finished_run / "classifier" / "predictions.csv").set_index("study_id")
    assert "chosen on val alone" in metrics["threshold_rule"]
    chosen = 0
    for name, own in metrics["findings"].items():
        truth = val[f"label:{name}"].to_numpy()
        if len(set(truth)) < 2:
            assert own["threshold"] is None
            assert "val has" in own["threshold_reason"]
            continue
        false, true, cuts = roc_curve(truth, said[name], drop_intermediate=False)
        distance = np.hypot(false, 1 - true)
        best = [cut for cut, d in zip(cuts, distance, strict=True) if d < distance.min() + 1e-9]
        assert min(abs(own["threshold"] - cut) for cut in best) < 1e-4
        chosen += 1
        labels = frame.loc[predictions.index, f"label:{name}"]
        (tn, fp), (fn, tp) = confusion_matrix(labels, predictions[name] >= own["threshold"], labels=[0, 1])
        if tp + fn:
            assert own["sensitivity"]["value"] == pytest.approx(tp / (tp + fn))
        if tn + fp:
            assert own["specificity"]["value"] == pytest.approx(tn / (tn + fp))
    assert chosen > 0
