"""`RUN/probe/` of a whole run: the curve over few labels, of the features that the classifier stage computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import ctx_distill
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.probing.run_curve import SHOTS, write_few_labels
from ctx_distill.reporting import build_page
from ctx_distill.training.pooled_features import features_key, read_features, write_features

pytestmark = pytest.mark.full


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "tiny"))


def test_the_stage_keeps_what_the_model_gives(finished_run: Path, cohort: Path) -> None:
    manifest = read_manifest(cohort / "ct.csv")
    model = ctx_distill.load(finished_run)
    key = features_key(model.encoder_fingerprint, manifest.fingerprint)
    kept = read_features(finished_run / "classifier", key)
    assert kept is not None
    assert len(kept) == len(manifest)
    for row in (0, len(manifest) - 1):
        np.testing.assert_allclose(kept[row], model.pooled(manifest.scan_file(row).read()), atol=1e-4)
    assert read_features(finished_run / "classifier", features_key("another", manifest.fingerprint)) is None


def test_the_curve_is_made_once_and_stands_on_the_page(run: Path) -> None:
    table = pd.read_csv(run / "probe" / "few_shot.csv", dtype={"shots": str})
    assert set(table["shots"]) == set(SHOTS)
    everybody = table.set_index("shots").loc["100%"]
    whole = json.loads((run / "probe" / "metrics.json").read_text())["macro_auroc"]["value"]
    assert everybody["macro_auroc"] == pytest.approx(whole, abs=1e-6)
    assert not (run / "probe" / "features.safetensors").exists()  # the stage's were taken
    html = (run / "index.html").read_text()
    assert 'id="few-labels"' in html
    assert f"{everybody['macro_auroc']:.3f} [" in html
    assert 'id="few-labels"' in (run / "classifier" / "index.html").read_text()

    before = (run / "probe" / "few_shot.csv").stat().st_mtime_ns
    assert write_few_labels(run) is False
    assert (run / "probe" / "few_shot.csv").stat().st_mtime_ns == before
    (run / "probe" / "few_shot.csv").unlink()
    assert write_few_labels(run) is True


def test_without_the_stages_features_there_is_no_curve_and_the_page_is_whole(run: Path) -> None:
    shutil.rmtree(run / "probe")
    (run / "classifier" / "features.safetensors").unlink()
    assert write_few_labels(run) is False
    build_page(run)
    html = (run / "index.html").read_text()
    assert 'id="few-labels"' not in html
    assert 'id="made"' in html


def test_features_of_something_else_or_damaged_are_not_taken(tmp_path: Path) -> None:
    pooled = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_features(tmp_path, "a key", pooled)
    found = read_features(tmp_path, "a key")
    assert found is not None
    np.testing.assert_array_equal(found, pooled)
    assert read_features(tmp_path, "another") is None
    (tmp_path / "features.safetensors").write_bytes(b"cut off")
    assert read_features(tmp_path, "a key") is None
