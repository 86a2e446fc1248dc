"""Scans at an fsspec address read, prepared and trained on like local ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
import torch

from ctx_distill.commands.main import main
from ctx_distill.data.io.scan_file import ScanFile
from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.errors import InputError

SPEC = VolumeSpec(spacing=(12.0, 12.0, 12.0), shape=(24, 32, 32))


@pytest.fixture
def remote(cohort: Path, tmp_path: Path) -> Path:
    """A manifest away from its scans, which it finds by an address."""
    frame = pd.read_csv(cohort / "ct.csv", dtype=str, keep_default_na=False)
    frame["root"] = f"file://{cohort}"
    frame.to_csv(tmp_path / "ct.csv", index=False)
    return tmp_path / "ct.csv"


def test_the_same_tensors(remote: Path, cohort: Path) -> None:
    here, there = (CTDataModule(str(p), SPEC, batch_size=4, cache_gb=0.0) for p in (cohort / "ct.csv", remote))
    for one, other in zip(here.train_dataloader(), there.train_dataloader(), strict=True):
        assert torch.equal(one.volume, other.volume)


def test_prepare_and_check(remote: Path, tmp_path: Path, tiny_preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prepare", str(remote), str(tmp_path / "out"), "--preset", str(tiny_preset), "--workers", "1"]
    count = len(read_manifest(remote))
    assert main(command) == 0
    assert f"{count} prepared, 0 already there" in capsys.readouterr().out
    assert main(command) == 0
    assert f"0 prepared, {count} already there" in capsys.readouterr().out
    assert main(["check", str(remote), "--out", str(tmp_path / "check"), "--workers", "1"]) == 0


def test_memory_files_and_dicom_folders(cohort: Path, real_mini: Path) -> None:
    memory = fsspec.filesystem("memory")
    source = sorted((cohort / "ct").glob("*.nii.gz"))[0]
    memory.pipe("/bucket/a.nii.gz", source.read_bytes())
    scan = ScanFile(Path("a"), url="memory://bucket/a.nii.gz")
    np.testing.assert_array_equal(scan.read().voxels, ScanFile(source).read().voxels)
    before = scan.stamp()
    memory.pipe("/bucket/a.nii.gz", source.read_bytes()[:-100])
    assert scan.stamp() != before
    with pytest.raises(InputError, match=r"memory://bucket/a.nii.gz: .*truncated"):
        scan.read()
    folder = real_mini / "ct/tcga_34_2605_dicom"
    for path in sorted(folder.iterdir()):
        memory.pipe(f"/bucket/dicom/{path.name}", path.read_bytes())
    np.testing.assert_array_equal(
        ScanFile(Path("d"), url="memory://bucket/dicom").read().voxels, ScanFile(folder).read().voxels
    )


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("memory://bucket/none.nii.gz", "download failed"),
        ("nosuch://bucket/a.nii.gz", "a URL that fsspec supports"),
    ],
)
def test_addresses_that_lead_nowhere(url: str, word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        ScanFile(Path("a"), url=url).read()
    assert url in str(caught.value)
    with pytest.raises(InputError):
        ScanFile(Path("a"), url=url).stamp()


def test_what_is_fetched_does_not_stay(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = shutil.copy(sorted((cohort / "ct").glob("*.nii.gz"))[0], tmp_path.parent)
    ScanFile(Path("a"), url=f"file://{source}").read()
    assert not list(tmp_path.iterdir())
