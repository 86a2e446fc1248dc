"""A folder of DICOM slices written by pydicom, read through ITK: the place, the HU, and the gaps."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from ctx_distill.data.io.volume import read_volume
from ctx_distill.types import InputError

SHAPE = (7, 10, 12)
STEP = 2.5


def stored() -> NDArray[np.int16]:
    return np.random.default_rng(2).integers(0, 1500, SHAPE, dtype=np.int16)


def write_slice(path: Path, pixels: NDArray[Any], position: Any, uid: str, number: int, **tags: Any) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Modality, ds.SeriesInstanceUID, ds.InstanceNumber = "CT", uid, number
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.Rows, ds.Columns = pixels.shape
    ds.PixelSpacing = [0.9, 0.8]  # between rows, between columns
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.ImagePositionPatient = [float(p) for p in position]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleSlope, ds.RescaleIntercept = 2, -1024
    for key, value in tags.items():
        setattr(ds, key, value)
    ds.PixelData = pixels.tobytes()
    ds.save_as(path, enforce_file_format=True)


def series(folder: Path, n: int = SHAPE[0], *, tilt: float = 0.0, prefix: str = "s", **tags: Any) -> Path:
    """Files are named in random order, as hospitals' exports are; instance numbers run from the head downwards."""
    folder.mkdir(exist_ok=True)
    uid, names = generate_uid(), list(range(n))
    random.Random(4).shuffle(names)
    for k in range(n):
        position = (-5.0, 7.0 + tilt * k, -100.0 + STEP * k)
        write_slice(folder / f"{prefix}{names[k]:02d}", stored()[k % 7], position, uid, n - k, **tags)
    return folder


def positions(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda p: float(pydicom.dcmread(p).ImagePositionPatient[2]))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_volume(folder)
    for word in (str(folder), *words):
        assert word in str(caught.value)


def test_place_and_hu(tmp_path: Path) -> None:
    volume = read_volume(series(tmp_path / "a"))
    np.testing.assert_array_equal(volume.voxels, stored().astype(int) * 2 - 1024)
    assert volume.voxels.dtype == np.int16
    expected = np.array([[0, 0, 0.8, -5], [0, 0.9, 0, 7], [STEP, 0, 0, -100], [0, 0, 0, 1]])
    np.testing.assert_allclose(volume.affine_lps, expected, atol=1e-9)
    assert volume.spacing == pytest.approx((STEP, 0.9, 0.8))


def test_same_content_as_the_other_formats(tmp_path: Path) -> None:
    volume = read_volume(series(tmp_path / "a"))
    image = sitk.GetImageFromArray((stored().astype(np.int16) * 2 - 1024).astype(np.int16))
    image.SetSpacing((0.8, 0.9, STEP))
    image.SetOrigin((-5, 7, -100))
    for name in ("a.nii.gz", "a.nii", "a.nrrd", "a.mha"):
        sitk.WriteImage(image, str(tmp_path / name))
        other = read_volume(tmp_path / name)
        np.testing.assert_array_equal(other.voxels, volume.voxels)
        np.testing.assert_allclose(other.affine_lps, volume.affine_lps, atol=1e-4)


def test_slices_stored_from_head_to_feet_and_sagittal(tmp_path: Path) -> None:
    down = read_volume(series(tmp_path / "a", ImageOrientationPatient=[-1, 0, 0, 0, 1, 0]))
    # The normal points to the feet, so slices run downwards, and the affine says so: the same voxel, the same place.
    np.testing.assert_array_equal(down.voxels[0], stored()[6].astype(int) * 2 - 1024)
    np.testing.assert_allclose(down.affine_lps[:3, 0], [0, 0, -STEP], atol=1e-9)
    np.testing.assert_allclose(down.affine_lps[:3, 2], [-0.8, 0, 0], atol=1e-9)
    np.testing.assert_allclose(down.affine_lps[:3, 3], [-5, 7, -100 + 6 * STEP], atol=1e-9)


def test_gantry_tilt_is_in_the_affine(tmp_path: Path) -> None:
    volume = read_volume(series(tmp_path / "a", tilt=0.6))
    np.testing.assert_allclose(volume.affine_lps[:3, 0], [0, 0.6, STEP], atol=1e-9)


def test_fractions_and_slopes_that_differ(tmp_path: Path) -> None:
    folder = series(tmp_path / "a")
    expected = []
    for k, path in enumerate(positions(folder)):
        ds = pydicom.dcmread(path)
        ds.RescaleSlope = [2, 0.5][k % 2]
        ds.save_as(path)
        expected.append(stored()[k] * float(ds.RescaleSlope) - 1024)
    np.testing.assert_allclose(read_volume(folder).voxels, np.stack(expected), atol=1e-3)


def test_the_series_with_the_most_slices_is_read_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = series(tmp_path / "a", n=3, prefix="short")
    series(folder)
    series(folder, n=9, prefix="scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    (folder / "LICENSE").write_text("not an image")
    with caplog.at_level(logging.WARNING):
        volume = read_volume(folder)
    np.testing.assert_array_equal(volume.voxels, stored().astype(int) * 2 - 1024)
    assert "2 series" in caplog.text


def test_padding_is_air(tmp_path: Path) -> None:
    folder = series(tmp_path / "a", RescaleSlope=1)
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        pixels = ds.pixel_array.copy()
        pixels[0, 0] = -2000
        # As some scanners write it: the value's type is unsigned, and -2000 is meant.
        ds.add(pydicom.DataElement(0x00280120, "US", 63536))
        ds.PixelData = pixels.tobytes()
        ds.save_as(path)
    voxels = read_volume(folder).voxels
    assert (voxels[:, 0, 0] == -1024).all()
    np.testing.assert_array_equal(voxels[:, 1:], stored()[:, 1:].astype(int) - 1024)


def test_a_missing_slice(tmp_path: Path) -> None:
    folder = series(tmp_path / "a")
    positions(folder)[3].unlink()
    refused(folder, "1 slice(s) missing")


def test_a_doubled_slice(tmp_path: Path) -> None:
    folder = series(tmp_path / "a")
    shutil.copy(positions(folder)[2], folder / "copy")
    refused(folder, "same position")


def test_uneven_spacing(tmp_path: Path) -> None:
    folder = series(tmp_path / "a")
    path = positions(folder)[3]
    ds = pydicom.dcmread(path)
    ds.ImagePositionPatient[2] += 0.9
    ds.save_as(path)
    refused(folder, "uneven spacing")


@pytest.mark.parametrize(
    ("tags", "word"),
    [
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, "ImageOrientationPatient"),
        ({"PixelSpacing": [0.5, 0.5]}, "PixelSpacing"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient"),
        ({"NumberOfFrames": 3}, "multi-frame"),
        ({"SamplesPerPixel": 3}, "colour"),
        ({"Rows": 9}, "9 x 12"),
    ],
)
def test_one_slice_that_does_not_belong(tmp_path: Path, tags: dict[str, Any], word: str) -> None:
    folder = series(tmp_path / "a")
    path = positions(folder)[3]
    ds = pydicom.dcmread(path)
    for key, value in tags.items():
        setattr(ds, key, value)
    ds.save_as(path)
    refused(folder, word)


def test_one_slice_truncated_or_alone(tmp_path: Path) -> None:
    folder = series(tmp_path / "a")
    path = positions(folder)[3]
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "cannot decode the pixels")
    refused(series(tmp_path / "b", n=1), "one slice")
