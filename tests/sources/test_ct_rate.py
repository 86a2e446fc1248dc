"""CT-RATE's tree in miniature: names, splits, reconstructions, raw values with slope and spacing in a table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from ctx_distill.commands.main import main
from ctx_distill.data.manifests.manifest import Manifest, read_manifest
from ctx_distill.errors import InputError
from ctx_distill.sources.ct_rate import LABELS

SPACING = (0.7, 0.8, 2.0)
SLOPE, INTERCEPT = 1.0, -1024.0


def hounsfield() -> np.ndarray[Any, np.dtype[np.int16]]:
    """(x, y, z): air, with a block of soft tissue in it."""
    hu = np.full((20, 22, 18), -1000, dtype=np.int16)
    hu[4:16, 4:18, 2:16] = 40
    hu[6:9, 6:9, 4:8] = 300
    return hu


def rows_of(path: Path, header: list[str], rows: list[list[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_tree(root: Path, fixed: bool) -> Path:
    """Two train patients (one with two reconstructions) and one of valid; the second train volume has no text."""
    names = {"train": ["train_1_a_1", "train_1_a_2", "train_2_a_1"], "valid": ["valid_1_a_1"]}
    base = root / "dataset"
    for split, volumes in names.items():
        long = {"train": "train", "valid": "validation"}[split]
        reports, metadata, labels = [], [], []
        for volume in volumes:
            patient, study = volume.rsplit("_", 2)[0], volume.rsplit("_", 1)[0]
            folder = base / (f"{split}_fixed" if fixed else split) / patient / study
            folder.mkdir(parents=True, exist_ok=True)
            values = hounsfield() if fixed else (hounsfield() - np.int16(INTERCEPT)).astype(np.int16)
            affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0]) if fixed else np.diag([-1.0, -1.0, 1.0, 1.0])
            image = nib.Nifti1Image(values, affine)
            image.header.set_slope_inter(1, 0)
            image.to_filename(folder / f"{volume}.nii.gz")
            given = volume != "train_2_a_1"
            reports.append([f"{volume}.nii.gz", "cough", "CT", "Clear lungs." if given else "Not given.", "Not given."])
            thickness = 1.0 if volume.endswith("_2") else SPACING[2]
            metadata.append([f"{volume}.nii.gz", f"[{SPACING[0]}, {SPACING[1]}]", INTERCEPT, SLOPE, 18, thickness])
            labels.append([f"{volume}.nii.gz", *([1] + [0] * 17)])
        head = ["VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"]
        rows_of(base / "radiology_text_reports" / f"{long}_reports.csv", head, reports)
        head = ["VolumeName", "XYSpacing", "RescaleIntercept", "RescaleSlope", "NumberofSlices", "ZSpacing"]
        rows_of(base / "metadata" / f"{long}_metadata.csv", head, metadata)
        rows_of(base / "multi_abnormality_labels" / f"{split}_predicted_labels.csv", ["VolumeName", *LABELS], labels)
    return root


def built(root: Path, *options: str) -> Manifest:
    out = root / "ct.csv"
    assert main(["manifest", "ct-rate", str(root), str(out), *options]) == 0
    return read_manifest(out)


def test_one_reconstruction_the_thinnest_with_text_labels_and_splits(tmp_path: Path) -> None:
    manifest = built(write_tree(tmp_path, fixed=True))
    frame = manifest.frame.set_index("image_id")
    assert list(frame.index) == ["train_1_a_2", "train_2_a_1", "valid_1_a_1"]
    assert frame.loc["train_1_a_2", ["study_id", "patient_id", "findings", "impression"]].tolist() == [
        "train_1_a", "train_1", "Clear lungs.", "",
    ]  # fmt: skip
    assert frame.loc["train_2_a_1", "findings"] == ""
    assert frame.loc["valid_1_a_1", "split"] == "test"
    assert set(frame.loc[["train_1_a_2", "train_2_a_1"], "split"]) <= {"train", "val"}
    assert manifest.finding_names == tuple(name.lower() for name in LABELS)
    assert frame.loc["valid_1_a_1", "label:medical material"] == 1
    assert manifest.labels()[:, 1:].max() == 0


def test_all_reconstructions_and_what_is_not_on_the_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path, fixed=True)
    (tmp_path / "dataset/train_fixed/train_2/train_2_a/train_2_a_1.nii.gz").unlink()
    (tmp_path / "dataset/metadata/no_chest_valid.txt").write_text("valid_1_a\n")
    manifest = built(tmp_path, "--reconstructions", "all")
    assert manifest.frame["image_id"].tolist() == ["train_1_a_2", "train_1_a_1"]
    told = capsys.readouterr().out
    assert "excluded, image file does not exist: 1" in told
    assert "excluded, no chest (listed in no_chest_valid.txt): 1" in told


def test_the_first_release_becomes_the_fixed_one(tmp_path: Path) -> None:
    """Raw values, identity spacing and a metadata table give the scan that the fixed file holds."""
    first = built(write_tree(tmp_path / "first", fixed=False))
    fixed = built(write_tree(tmp_path / "fixed", fixed=True))
    raw, right = first.scan_file(1).read(), fixed.scan_file(1).read()
    np.testing.assert_array_equal(raw.voxels, right.voxels)
    np.testing.assert_array_equal(raw.voxels.transpose(2, 1, 0), hounsfield())
    np.testing.assert_allclose(raw.spacing, SPACING[::-1], rtol=1e-6)
    np.testing.assert_allclose(raw.affine_lps[:3, :3], right.affine_lps[:3, :3], atol=1e-6)


def test_slope_and_intercept_asked_of_a_file_in_hu_are_refused(tmp_path: Path) -> None:
    write_tree(tmp_path, fixed=False)
    manifest = built(tmp_path)
    image = nib.Nifti1Image(hounsfield(), np.eye(4))
    image.to_filename(manifest.image_file(1))
    with pytest.raises(
        InputError, match=r"train_2_a_1.nii.gz: values are in HU already .* sets slope 1 and intercept -1024"
    ):
        manifest.scan_file(1).read()


def test_a_manifest_beside_the_data_names_its_root(tmp_path: Path) -> None:
    write_tree(tmp_path / "data", fixed=True)
    out = tmp_path / "elsewhere" / "ct.csv"
    assert main(["manifest", "ct-rate", str(tmp_path / "data"), str(out)]) == 0
    manifest = read_manifest(out)
    assert (
        manifest.image_file(0) == (tmp_path / "data/dataset/train_fixed/train_1/train_1_a/train_1_a_2.nii.gz").resolve()
    )
    inside = built(tmp_path / "data")
    assert inside.image_file(0).resolve() == manifest.image_file(0)
    assert "root" not in inside.frame.columns


def test_what_is_no_ct_rate_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["manifest", "ct-rate", str(tmp_path), str(tmp_path / "ct.csv")]) == 2
    assert "no folder train, valid, train_fixed or valid_fixed" in capsys.readouterr().err
    write_tree(tmp_path, fixed=False)
    (tmp_path / "dataset/metadata/train_metadata.csv").unlink()
    assert main(["manifest", "ct-rate", str(tmp_path), str(tmp_path / "ct.csv")]) == 2
    assert "train_metadata.csv: no such file" in capsys.readouterr().err
    assert not (tmp_path / "ct.csv").exists()
    assert not list(tmp_path.glob(".*"))
