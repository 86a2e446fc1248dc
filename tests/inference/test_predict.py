"""A model on scans as they lie on disk: the same numbers as the stages', and saliency where the lesion is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

import ctx_distill
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.errors import InputError
from ctx_distill.inference.model import CTModel


@pytest.fixture(scope="module")
def model(finished_run: Path) -> CTModel:
    return ctx_distill.load(finished_run)


def test_it_says_what_the_stages_said(model: CTModel, finished_run: Path, cohort: Path) -> None:
    test = read_manifest(cohort / "ct.csv").split("test")
    files = [test.image_file(row) for row in test.frame.index]
    found = model.predict(files)
    tables = {
        name: pd.read_csv(finished_run / name / "predictions.csv").set_index("study_id")
        for name in ("zero_shot", "classifier")
    }
    for name, table in tables.items():
        said = pd.DataFrame([one.zero_shot if name == "zero_shot" else one.probabilities for one in found])
        means = said.groupby(test.frame["study_id"].to_numpy()).mean()  # a study may have several images
        assert list(means.columns) == list(table.columns)
        np.testing.assert_allclose(means.to_numpy(), table.loc[means.index].to_numpy(), atol=2e-6)
    assert {one.asked for one in found} == {"classifier"}
    np.testing.assert_allclose([np.linalg.norm(one.embedding) for one in found], 1, atol=1e-5)


def test_report_is_the_stages(model: CTModel, finished_run: Path, cohort: Path) -> None:
    test = read_manifest(cohort / "ct.csv").split("test")
    table = pd.read_csv(finished_run / "reports.csv", keep_default_na=False).set_index("study_id")
    row = test.frame.index[0]
    said = model.predict(str(test.image_file(row)), report=True)
    assert said.report == str(table.at[test.frame.at[row, "study_id"], "generated"])


def test_nearest_agrees_with_numpy(model: CTModel, finished_run: Path, cohort: Path) -> None:
    from safetensors.numpy import load_file

    one = model.predict(next((cohort).glob("**/*.nii.gz")))
    values = load_file(finished_run / "index" / "artefact" / "model.safetensors")["values"].astype(np.float64)
    cosine = values @ one.embedding / np.linalg.norm(values, axis=1)
    items = pd.read_csv(finished_run / "index" / "artefact" / "items.csv")
    near = model.nearest(one, 4)
    assert [n.image_id for n in near] == [items.at[i, "image_id"] for i in np.argsort(-cosine)[:4]]
    np.testing.assert_allclose([n.similarity for n in near], np.sort(cosine)[::-1][:4], atol=1e-5)


def test_artefacts_open_by_themselves(finished_run: Path, cohort: Path) -> None:
    scan = next(cohort.glob("**/*.nii.gz"))
    whole = ctx_distill.load(finished_run).predict(scan)
    dual = ctx_distill.load(finished_run / "align" / "artefact", vocabulary="phantom").predict(scan)
    head = ctx_distill.load(finished_run / "classifier").predict(scan)
    assert (dual.asked, head.asked) == ("zero-shot", "classifier")
    assert dual.probabilities == pytest.approx(whole.zero_shot, abs=1e-6)
    assert head.probabilities == pytest.approx(whole.probabilities, abs=1e-6)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("nowhere", "no such folder"),
        ("", "Run `ctx-distill align`"),
        ("expert", "xray-expert|no artefact|neither"),
        ("distill", "ct-encoder artefact"),
    ],
)
def test_what_cannot_be_opened_is_refused(finished_run: Path, tmp_path: Path, place: str, says: str) -> None:
    folder = (finished_run if place in ("expert", "distill") else tmp_path) / place
    with pytest.raises(InputError, match=says):
        ctx_distill.load(folder)


def test_wrong_questions_are_refused(model: CTModel, cohort: Path, tmp_path: Path) -> None:
    scan = next(cohort.glob("**/*.nii.gz"))
    with pytest.raises(InputError, match="not a finding of this model"):
        model.predict(scan, saliency=["scoliosis"])
    with pytest.raises(InputError, match="no such file"):
        model.predict(tmp_path / "missing.nii.gz")


def test_package_imports_nothing_heavy() -> None:
    code = "import sys, ctx_distill; print(sorted({'torch','numpy','lightning','yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_saliency_is_written_in_the_scans_geometry(model: CTModel, cohort: Path, tmp_path: Path) -> None:
    scan = next(cohort.glob("**/*.nii.gz"))
    name = model.findings[0]
    model.predict(scan, saliency=[name]).saliency[name].write(tmp_path / "map.nii.gz")
    source, written = nib.load(scan), nib.load(tmp_path / "map.nii.gz")
    assert written.shape == source.shape
    np.testing.assert_array_equal(written.affine, source.affine)
    assert torch.from_numpy(np.asarray(written.dataobj)).max() > 0
