"""A hospital's tree in miniature: which series is taken, hashed ids, relative dates, paths that tell names."""

from __future__ import annotations

import hmac
import stat
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from ctx_distill.commands.main import main
from ctx_distill.data.io.volume import read_volume
from ctx_distill.data.manifests.manifest import Manifest, read_manifest

AXIAL, CORONAL = [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1]


def series(
    folder: Path, patient: str, study: str, number: int, slices: int = 12, step: float = 5.0, **tags: Any
) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    uid = generate_uid(entropy_srcs=[study, str(number), str(folder)])
    for index in range(slices):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = tags.get("SOPClassUID", CTImageStorage)
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        ds.Modality, ds.PatientID, ds.PatientName, ds.PatientBirthDate = "CT", patient, "Doe^Jane", "19600102"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SeriesNumber = study, uid, number
        ds.AccessionNumber, ds.StudyDate = f"acc-{study}", tags.get("day", "20200301")
        ds.ImageType = tags.get("ImageType", ["ORIGINAL", "PRIMARY", "AXIAL"])
        ds.ImageOrientationPatient = tags.get("orientation", AXIAL)
        along = np.cross(ds.ImageOrientationPatient[:3], ds.ImageOrientationPatient[3:])
        ds.ImagePositionPatient = [float(v) for v in np.array([0.0, 0.0, 0.0]) + along * index * step]
        ds.Rows, ds.Columns, ds.PixelSpacing, ds.SliceThickness = 8, 8, [1, 1], step
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
        ds.PixelData = np.full((8, 8), number * 100 + index, dtype=np.int16).tobytes()
        ds.save_as(folder / f"{number:03}_{index:03}.dcm", enforce_file_format=True)
    return str(uid)


@pytest.fixture
def tree(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    root = tmp_path / "pacs"
    uids = {
        "thick": series(root / "a/1", "7001", "1.2.1", 2, slices=12, step=5.0),
        "thin": series(
            root / "a/2", "7001", "1.2.1", 3, slices=40, step=1.0, ImageType=["DERIVED", "SECONDARY", "AXIAL"]
        ),
        "coronal": series(root / "a/3", "7001", "1.2.1", 4, slices=60, step=0.5, orientation=CORONAL),
        "scout": series(root / "a/4", "7001", "1.2.1", 1, slices=2, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        "dose": series(root / "a/5", "7001", "1.2.1", 99, slices=1, SOPClassUID=SecondaryCaptureImageStorage),
        "later": series(root / "b", "7001", "1.2.2", 1, day="20200331"),
        "few": series(root / "c", "7002", "1.2.3", 1, slices=4),
    }
    (root / "a/1/notes.txt").write_text("no DICOM")
    return root, uids


def built(root: Path, out: Path, *options: str) -> Manifest:
    assert main(["manifest", "dicom", str(root), str(out), "--workers", "1", *options]) == 0
    return read_manifest(out)


def test_the_thinnest_axial_series_under_hashed_ids(
    tree: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, uids = tree
    key = tmp_path / "private/key"
    frame = built(root, root / "ct.csv", "--key", str(key)).frame
    assert frame["image_path"].tolist() == ["a/2", "b"]
    secret = bytes.fromhex(key.read_text().strip())

    def name(kind: str, value: str) -> str:
        return kind + hmac.new(secret, f"{kind}/{value}".encode(), sha256).hexdigest()[:16]

    assert frame["patient_id"].tolist() == [name("p", "7001")] * 2
    assert frame["study_id"].tolist() == [name("s", "1.2.1"), name("s", "1.2.2")]
    assert frame["image_id"].tolist() == [name("i", uids["thin"]), name("i", uids["later"])]
    text = (root / "ct.csv").read_text()
    for told in ("7001", "1.2.1", "Doe", "2020", uids["thin"], "acc-"):
        assert told not in text
    assert [line.split(",")[-2:] for line in text.splitlines()] == [
        ["study_day", "slice_mm"],
        ["0", "1.0"],
        ["30", "5.0"],
    ]
    told = capsys.readouterr().out
    for reason in ("localizer: 1", "secondary capture: 1", "not axial: 1", "fewer than 10 slices: 1",
                   "another series of the study was selected: 1", "file that is not DICOM: 1"):  # fmt: skip
        assert f"excluded, {reason}" in told
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    again = built(root, root / "again.csv", "--key", str(key)).frame
    assert again["patient_id"].tolist() == frame["patient_id"].tolist()


def test_all_series_ids_kept_and_reports(tree: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    root, uids = tree
    reports = tmp_path / "reports.csv"
    reports.write_text('study,report\nacc-1.2.1,"FINDINGS: Clear since ___. IMPRESSION: Normal."\n1.2.2,Effusion.\n')
    frame = built(root, root / "ct.csv", "--keep-ids", "--reconstructions", "all", "--reports", str(reports)).frame
    assert frame["image_id"].tolist() == [uids["thin"], uids["thick"], uids["later"]]
    assert frame["findings"].tolist() == ["Clear since.", "Clear since.", "Effusion."]
    assert frame["impression"].tolist() == ["Normal.", "Normal.", ""]
    assert "2020-03-31" in (root / "ct.csv").read_text()


def test_paths_that_tell_names_are_refused_and_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, key = tmp_path / "pacs", tmp_path / "private/key"
    series(root / "DOE_JANE/ct", "7001", "1.2.1", 1)
    series(root / "x/7002/ct", "7002", "1.2.2", 1)
    command = ["manifest", "dicom", str(root), str(tmp_path / "out/ct.csv"), "--key", str(key), "--workers", "1"]
    assert main(command) == 2
    assert "the paths of 2 of 2 series contain an id, a name or a date of the patient" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    manifest = built(root, tmp_path / "out/ct.csv", "--key", str(key), "--convert", str(tmp_path / "out/ct"))
    scan, source = manifest.scan_file(0).read(), read_volume(root / "DOE_JANE/ct")
    np.testing.assert_array_equal(scan.voxels, source.voxels)
    np.testing.assert_allclose(scan.affine_lps, source.affine_lps, atol=1e-6)
    for file in (tmp_path / "out").rglob("*.*"):
        assert b"Doe" not in file.read_bytes()
    assert len(built(root, tmp_path / "out/two.csv", "--key", str(key), "--keep-paths")) == 2


@pytest.mark.parametrize(
    "folder", ["AB_12-34", "x/ab1234.ct", "2020-03-01", "scan_01.03.2020", "1.2.840.77", "acc/acc_1.2.840.77"]
)
def test_ids_and_dates_in_paths_however_they_are_written(
    tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "pacs"
    series(root / folder, "AB-1234", "1.2.840.77", 1)
    command = ["manifest", "dicom", str(root), str(tmp_path / "out/ct.csv"), "--key", str(tmp_path / "key")]
    assert main([*command, "--workers", "1"]) == 2
    assert "the paths of 1 of 1 series" in capsys.readouterr().err


def test_a_series_inside_anothers_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, key = tmp_path / "pacs", tmp_path / "private/key"
    series(root / "one", "7001", "1.2.1", 1, slices=40, step=5.0)
    thin = series(root / "one", "7001", "1.2.1", 2, slices=20, step=1.0)
    frame = built(root, root / "ct.csv", "--key", str(key)).frame
    assert "in the same folder as a larger series (use --convert): 1" in capsys.readouterr().out
    assert len(frame) == 1
    manifest = built(root, tmp_path / "out/ct.csv", "--key", str(key), "--convert", str(tmp_path / "out/ct"))
    assert manifest.scan_file(0).read().voxels.shape[0] == 20
    assert thin


def test_a_key_inside_the_output_or_damaged_is_refused(
    tree: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = tree
    command = ["manifest", "dicom", str(root), str(root / "ct.csv"), "--workers", "1", "--key"]
    assert main([*command, str(root / "a/key")]) == 2
    assert "would be shared with it" in capsys.readouterr().err
    (tmp_path / "key").write_text("abc")
    assert main([*command, str(tmp_path / "key")]) == 2
    assert "not a key" in capsys.readouterr().err
    (tmp_path / "key").write_text("abcd")
    assert main([*command, str(tmp_path / "key")]) == 2
    assert "key: key of 2 bytes; expected at least 32" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (
        main(
            [
                "manifest",
                "dicom",
                str(empty),
                str(tmp_path / "x/ct.csv"),
                "--key",
                str(tmp_path / "k2"),
                "--workers",
                "1",
            ]
        )
        == 2
    )
    assert "no DICOM series (no files)" in capsys.readouterr().err


def test_a_localizer_in_the_series_damaged_headers_and_links(
    tree: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None of them costs the series that they lie beside."""
    root, uids = tree
    inside = pydicom.dcmread(root / "a/2/003_000.dcm")
    inside.ImageType, inside.ImageOrientationPatient = ["ORIGINAL", "PRIMARY", "LOCALIZER"], CORONAL
    inside.save_as(root / "a/2/000_scout.dcm", enforce_file_format=True)
    damaged = pydicom.dcmread(root / "a/1/002_000.dcm")
    damaged.add_new("SeriesNumber", "LO", "none")
    damaged.SeriesInstanceUID = generate_uid()
    damaged.save_as(root / "a/1/damaged.dcm", enforce_file_format=True)
    (root / "b/link.dcm").symlink_to(root / "a/1/002_000.dcm")
    frame = built(root, root / "ct.csv", "--keep-ids").frame
    assert frame["image_id"].tolist() == [uids["thin"], uids["later"]]
    assert read_volume(root / "a/2").voxels.shape == (40, 8, 8)
    told = capsys.readouterr().out
    for reason in ("DICOM file with a damaged header: 1", "symbolic link (not followed): 1", "localizer: 1"):
        assert f"excluded, {reason}" in told
