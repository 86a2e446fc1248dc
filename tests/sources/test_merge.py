"""Manifests of several data sets as one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ctx_distill.commands.main import main
from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.loading.order import Mixing
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.data.transforms.model_volume import VolumeSpec


def two(cohort: Path, folder: Path) -> tuple[Path, Path]:
    """The cohort twice under other names: once beside its scans, once away from them with one label more."""
    shutil.copytree(cohort / "ct", folder / "a/ct")
    shutil.copy(cohort / "ct.csv", folder / "a/first.csv")
    frame = pd.read_csv(cohort / "ct.csv", dtype=str, keep_default_na=False)
    frame["root"], frame["source"], frame["label:extra"] = str(cohort), "other", "1"
    frame["slope"], frame["intercept"] = "1", "0"
    (folder / "b").mkdir()
    frame.to_csv(folder / "b/second.csv", index=False)
    return folder / "a/first.csv", folder / "b/second.csv"


def test_rows_ids_roots_and_labels(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = two(cohort, tmp_path)
    assert main(["merge", str(tmp_path / "all.csv"), str(first), str(second)]) == 0
    merged, one, other = (read_manifest(path) for path in (tmp_path / "all.csv", first, second))
    assert len(merged) == len(one) + len(other)
    assert f"{len(merged)} images" in capsys.readouterr().out
    assert merged.frame["image_id"].tolist() == [f"first/{i}" for i in one.frame["image_id"]] + [
        f"other/{i}" for i in other.frame["image_id"]
    ]
    assert merged.finding_names == (*one.finding_names, "extra")
    labels = merged.labels()
    np.testing.assert_array_equal(labels[: len(one), :-1], one.labels())
    assert np.isnan(labels[: len(one), -1]).all()
    assert (labels[len(one) :, -1] == 1).all()
    for row in (0, len(one)):
        source = one if row == 0 else other
        assert merged.image_file(row).read_bytes() == source.image_file(0).read_bytes()
        assert merged.report(row) == source.report(0)
    assert merged.scan_file(len(one)).slope == 1.0
    assert merged.scan_file(0).slope is None


def test_training_mixes_them(cohort: Path, tmp_path: Path) -> None:
    first, second = two(cohort, tmp_path)
    assert main(["merge", str(tmp_path / "all.csv"), str(first), str(second)]) == 0
    spec = VolumeSpec((12.0, 12.0, 12.0), (24, 32, 32))
    module = CTDataModule(
        str(tmp_path / "all.csv"), spec, batch_size=2, mixing=Mixing("source", {"first": 0.75, "other": 0.25})
    )
    rows = [row for batch in module.train_dataloader() for row in batch.row.tolist()]
    sources = module.manifest.frame.loc[rows, "source"].tolist()
    assert len(set(rows)) == len(rows)
    assert abs(sources.count("first") / len(rows) - 0.75) < 0.1


def test_what_does_not_fit_together(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, _ = two(cohort, tmp_path)
    out = str(tmp_path / "all.csv")
    assert main(["merge", out, str(first)]) == 2
    assert "merge needs at least two manifests" in capsys.readouterr().err
    assert main(["merge", out, str(first), str(first)]) == 2
    assert "again, as in row" in capsys.readouterr().err
    assert not (tmp_path / "all.csv").exists()
    assert not list(tmp_path.glob(".*"))
