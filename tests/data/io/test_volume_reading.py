"""Every format gives the same HU in the same place; every damaged file a named refusal."""

from __future__ import annotations

import gzip
import itertools
import logging
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from ctx_distill.data.io.volume import Volume, read_volume
from ctx_distill.types import InputError

SHAPE = (9, 12, 14)  # k, j, i
SPACING = (0.8, 0.9, 2.5)  # i, j, k
ORIGIN = (-11.0, 22.0, -33.0)
ANGLE = np.radians(20)
DIRECTION = np.array([[np.cos(ANGLE), -np.sin(ANGLE), 0], [np.sin(ANGLE), np.cos(ANGLE), 0], [0, 0, 1]])
AFFINE_IJK = np.eye(4)  # to LPS
AFFINE_IJK[:3, :3] = DIRECTION * SPACING
AFFINE_IJK[:3, 3] = ORIGIN


def hu() -> NDArray[np.int16]:
    return np.random.default_rng(1).integers(-1024, 2000, SHAPE, dtype=np.int16)


def nifti(path: Path, array: NDArray[Any], slope: float | None = None, inter: float = 0.0, **header: Any) -> Path:
    """`array` (k, j, i) is stored as it is; slope and intercept stand in the header alone."""
    raw = nib.Nifti1Header()
    raw.set_data_shape(array.T.shape)
    raw.set_data_dtype(array.dtype)
    raw.set_sform(np.diag([-1.0, -1.0, 1.0, 1.0]) @ AFFINE_IJK, code=1)
    raw["scl_slope"], raw["scl_inter"] = (np.nan, np.nan) if slope is None else (slope, inter)
    raw["vox_offset"] = 352
    for key, value in header.items():
        raw[key] = value
    data = raw.binaryblock + b"\0" * 4 + array.tobytes()
    path.write_bytes(gzip.compress(data, 1) if path.name.endswith(".gz") else data)
    return path


def itk(path: Path, array: NDArray[Any], compress: bool = False) -> Path:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection(DIRECTION.flatten().tolist())
    sitk.WriteImage(image, str(path), useCompression=compress)
    return path


def check_same(volume: Volume, expected: NDArray[Any], atol: float = 0.0) -> None:
    """Compares voxel by voxel through the affine, so the order of the array's axes does not matter."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in volume.voxels.shape], indexing="ij"), axis=-1)
    world = index @ volume.affine_lps[:3, :3].T + volume.affine_lps[:3, 3]
    ijk = (world - ORIGIN) @ np.linalg.inv(AFFINE_IJK[:3, :3]).T
    nearest = ijk.round().astype(int)
    assert np.abs(ijk - nearest).max() < 1e-3
    i, j, k = np.moveaxis(nearest, -1, 0)
    assert len({*map(tuple, nearest.reshape(-1, 3))}) == expected.size
    np.testing.assert_allclose(volume.voxels, expected[k, j, i], atol=atol, rtol=0)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.nhdr", "a.mha", "a.mhd"])
def test_each_format_gives_the_same_hu_in_the_same_place(tmp_path: Path, name: str) -> None:
    path = nifti(tmp_path / name, hu()) if ".nii" in name else itk(tmp_path / name, hu())
    volume = read_volume(path)
    check_same(volume, hu())
    assert volume.voxels.dtype == np.int16
    assert volume.path == path
    assert sorted(volume.spacing) == pytest.approx(sorted(SPACING), rel=1e-5)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_compressed_files_read_alike(tmp_path: Path, name: str) -> None:
    check_same(read_volume(itk(tmp_path / name, hu(), compress=True)), hu())


def test_a_file_written_by_simpleitk_as_nifti_lies_in_the_same_place(tmp_path: Path) -> None:
    check_same(read_volume(itk(tmp_path / "a.nii.gz", hu())), hu())


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "u1", "<u2", "<i4", "<f4", ">f4", "<f8"])
def test_stored_types_and_byte_orders(tmp_path: Path, dtype: str) -> None:
    array = (hu() % 200).astype(dtype)
    header = nib.Nifti1Header(endianness=dtype[0]) if dtype[0] in "<>" else nib.Nifti1Header()
    header.set_data_shape(array.T.shape)
    header.set_data_dtype(array.dtype.newbyteorder("="))
    header.set_sform(np.diag([-1.0, -1.0, 1.0, 1.0]) @ AFFINE_IJK, code=1)
    header["vox_offset"] = 352
    path = tmp_path / "a.nii"
    path.write_bytes(header.binaryblock + b"\0" * 4 + array.tobytes())
    volume = read_volume(path)
    check_same(volume, array.astype(np.float64))
    assert volume.voxels.dtype.isnative
    assert volume.voxels.dtype == (np.float32 if "f" in dtype else np.int16)


@pytest.mark.parametrize(
    ("slope", "inter", "dtype"), [(2.0, -1024.0, "<i2"), (1.0, -1024.0, "<u2"), (0.5, 3.25, "<i2"), (2.0, -1.0, "<f4")]
)
def test_slope_and_intercept_once(tmp_path: Path, slope: float, inter: float, dtype: str) -> None:
    stored = (hu() % 1500).astype(dtype)
    path = nifti(tmp_path / "a.nii.gz", stored, slope, inter)
    check_same(read_volume(path), stored.astype(np.float64) * slope + inter, atol=1e-3)
    # nibabel as an independent reader
    check_same(read_volume(path), np.asarray(nib.load(path).get_fdata()).T, atol=1e-3)


def test_a_slope_of_zero_means_no_scaling(tmp_path: Path) -> None:
    check_same(read_volume(nifti(tmp_path / "a.nii", hu(), 0.0, 7.0)), hu())


def test_a_shift_beyond_int16_is_not_wrapped(tmp_path: Path) -> None:
    stored = np.full(SHAPE, 32000, dtype=np.int16)
    stored[0] = -5
    check_same(read_volume(nifti(tmp_path / "a.nii", stored, 1.0, 5000.0)), stored.astype(np.float64) + 5000)


def test_qform_alone_and_nifti_2(tmp_path: Path) -> None:
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ AFFINE_IJK
    for kind, name in ((nib.Nifti1Image, "a.nii"), (nib.Nifti2Image, "b.nii.gz")):
        image = kind(hu().T, None)
        image.set_qform(ras, code=1)
        image.set_sform(None, code=0)
        image.to_filename(tmp_path / name)
        check_same(read_volume(tmp_path / name), hu())


def test_units_of_the_header_are_honoured(tmp_path: Path) -> None:
    image = nib.Nifti1Image(hu().T, np.diag([-0.001, -0.001, 0.001, 1.0]) @ AFFINE_IJK)
    image.header.set_xyzt_units("meter")
    image.to_filename(tmp_path / "a.nii")
    check_same(read_volume(tmp_path / "a.nii"), hu())


def test_a_time_axis_of_one_is_no_fourth_dimension(tmp_path: Path) -> None:
    nib.Nifti1Image(hu().T[..., None], np.diag([-1.0, -1.0, 1.0, 1.0]) @ AFFINE_IJK).to_filename(tmp_path / "a.nii")
    check_same(read_volume(tmp_path / "a.nii"), hu())


def test_extensions_and_members_are_passed(tmp_path: Path) -> None:
    image = nib.Nifti1Image(hu().T, np.diag([-1.0, -1.0, 1.0, 1.0]) @ AFFINE_IJK)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 5000))
    image.to_filename(tmp_path / "a.nii")
    check_same(read_volume(tmp_path / "a.nii"), hu())
    data = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(data[:3000]) + gzip.compress(data[3000:]) + b"\0" * 100)
    check_same(read_volume(tmp_path / "b.nii.gz"), hu())


@pytest.mark.parametrize("tail", [b"", b"\0" * 512])
def test_one_member_and_several_and_padding_give_the_same_voxels(tmp_path: Path, tail: bytes) -> None:
    plain = nifti(tmp_path / "a.nii", hu()).read_bytes()
    for number, cuts in enumerate(([], [352], [0], [100, 5000], [len(plain)])):
        ends = [0, *cuts, len(plain)]
        members = b"".join(gzip.compress(plain[a:b]) for a, b in itertools.pairwise(ends))
        path = tmp_path / f"{number}.nii.gz"
        path.write_bytes(members + tail)
        check_same(read_volume(path), hu())


@pytest.mark.parametrize("extra", [1, 600])
def test_a_few_bytes_after_the_voxels_are_padding(tmp_path: Path, extra: int) -> None:
    plain = nifti(tmp_path / "a.nii", hu()).read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(plain + b"\1" * extra))
    check_same(read_volume(path), hu())


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(nifti(tmp_path / "a.nii", hu()).read_bytes()))
    packed[-8] ^= 1
    path = tmp_path / "b.nii.gz"
    path.write_bytes(packed)
    with pytest.raises(InputError, match=r"b\.nii\.gz: damaged gzip data"):
        read_volume(path)


def test_no_orientation_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_volume(nifti(tmp_path / "a.nii", hu(), sform_code=0, qform_code=0, pixdim=[1, 1, 1, 1, 1, 1, 1, 1]))
    assert "orientation" in caplog.text


def refused(path: Path, *words: str) -> str:
    with pytest.raises(InputError) as caught:
        read_volume(path)
    message = str(caught.value)
    assert str(path) in message
    for word in words:
        assert word in message, message
    return message


def test_what_is_not_there_or_of_another_kind(tmp_path: Path) -> None:
    refused(tmp_path / "none.nii.gz", "no such file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no DICOM")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", "suffix", ".nii.gz")
    (tmp_path / "slice.dcm").write_bytes(b"x" * 200)
    refused(tmp_path / "slice.dcm", "folder")
    for name in ("zero.nii", "zero.nii.gz", "zero.nrrd", "zero.mha"):
        (tmp_path / name).write_bytes(b"")
        refused(tmp_path / name)
        (tmp_path / name).write_bytes(b"<html>not found</html>" * 50)
        refused(tmp_path / name)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.npz"])
def test_no_permission(unprivileged: tuple[Path, Callable[[], AbstractContextManager[None]]], name: str) -> None:
    folder, acting = unprivileged
    path = folder / name
    path.write_bytes(b"\x1f\x8b")
    path.chmod(0)
    with acting():
        refused(path, "Permission denied", "permissions")
    (folder / "closed").mkdir(mode=0)
    with acting():
        refused(folder / "closed", "Permission denied", "permissions")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "z.nrrd", "z.mha"])
@pytest.mark.parametrize("keep", [0.3, 0.97])
def test_truncated(tmp_path: Path, name: str, keep: float) -> None:
    path = tmp_path / name
    nifti(path, hu()) if ".nii" in name else itk(path, hu(), compress=name.startswith("z"))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    refused(path)


def test_a_detached_file_that_is_missing_or_short(tmp_path: Path) -> None:
    path = itk(tmp_path / "a.mhd", hu())
    raw = tmp_path / "a.raw"
    raw.write_bytes(raw.read_bytes()[:100])
    refused(path, "bytes")
    raw.unlink()
    refused(path)


def test_damaged_gzip(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii.gz", hu())
    data = bytearray(path.read_bytes())
    path.write_bytes(data + b"garbage")
    refused(path, "unexpected data after the end")
    flipped = bytearray(data)
    flipped[-6] ^= 1  # the checksum
    path.write_bytes(flipped)
    refused(path, "gzip")


def test_a_header_that_claims_too_much(tmp_path: Path) -> None:
    for name in ("a.nii", "a.nii.gz"):
        path = tmp_path / name
        nifti(path, hu(), dim=[3, 32000, 32000, 32000, 1, 1, 1, 1])
        refused(path, "declares", "32000 x 32000 x 32000")
        nifti(path, hu(), dim=[3, 1200, 1200, 1200, 1, 1, 1, 1])
        refused(path, "declares", "bytes")
    path = itk(tmp_path / "a.mha", hu())
    path.write_bytes(path.read_bytes().replace(b"DimSize = 14 12 9", b"DimSize = 30000 30000 9"))
    refused(path, "declares")
    path = itk(tmp_path / "a.nrrd", hu())
    path.write_bytes(path.read_bytes().replace(b"sizes: 14 12 9", b"sizes: 30000 30000 9"))
    refused(path, "declares")


def test_a_stream_longer_than_its_header_says_is_no_volume(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii.gz", np.zeros((90, 120, 140), np.int16), dim=[3, 140, 120, 9, 1, 1, 1, 1])
    refused(path, "continues after the voxels")


@pytest.mark.parametrize("name", ["a.nii", "a.nrrd", "a.mha"])
def test_more_or_fewer_dimensions_and_colour(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    series = np.zeros((2, *SHAPE), np.int16)
    if name.endswith(".nii"):
        nib.Nifti1Image(series.T, np.eye(4)).to_filename(path)
    else:
        sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(a) for a in series]), str(path))
    refused(path, "4 dimensions")
    if name.endswith(".nii"):
        colour = np.zeros(SHAPE[::-1], dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
        nib.Nifti1Image(colour, np.eye(4)).to_filename(path)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((*SHAPE, 3), np.uint8), isVector=True), str(path))
    refused(path, "colour")
    if name.endswith(".nii"):
        nifti(path, np.zeros((1, 12, 14), np.int16))
    else:
        itk(path, np.zeros((1, 12, 14), np.int16))
    refused(path, "at least two voxels")


def test_zero_slices(tmp_path: Path) -> None:
    refused(nifti(tmp_path / "a.nii", hu(), dim=[3, 14, 12, 0, 1, 1, 1, 1]), "empty")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd"])
def test_voxels_that_are_no_numbers(tmp_path: Path, bad: float, name: str) -> None:
    array = hu().astype(np.float32)
    array[3, 4, 5] = bad
    refused((nifti if ".nii" in name else itk)(tmp_path / name, array), "NaN")


def test_geometry_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    flat = {"srow_x": [1, 0, 1, 0], "srow_y": [0, 1, 0, 0], "srow_z": [0, 0, 0, 0]}
    refused(nifti(path, hu(), **flat), "singular")
    refused(nifti(path, hu(), srow_x=[0, 0, 0, 0], srow_y=[0, 1, 0, 0], srow_z=[0, 0, 1, 0]), "spacing")
    refused(nifti(path, hu(), srow_x=[np.nan, 0, 0, 0]), "NaN")
    metres = {"srow_x": [0.0008, 0, 0, 0], "srow_y": [0, 0.0008, 0, 0], "srow_z": [0, 0, 0.002, 0]}
    refused(nifti(path, hu(), **metres), "spacing", "unit")


def test_a_map_that_itk_leaves_unapplied_is_refused(tmp_path: Path) -> None:
    path = itk(tmp_path / "a.mha", hu())
    data = path.read_bytes()
    path.write_bytes(data.replace(b"ElementDataFile", b"ElementToIntensityFunctionSlope = 2\nElementDataFile"))
    with_slope = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_array_equal(with_slope, hu())  # ITK: unapplied
    refused(path, "Slope = 2")
    path.write_bytes(data.replace(b"ElementDataFile", b"ElementToIntensityFunctionSlope = 1\nElementDataFile"))
    check_same(read_volume(path), hu())


def test_mutated_headers_end_in_a_value_or_a_named_error(tmp_path: Path) -> None:
    """A few hundred flips here; the long fuzz belongs to the data issue."""
    rng = np.random.default_rng(5)
    path = nifti(tmp_path / "a.nii", hu())
    good = path.read_bytes()
    refusals = 0
    for _ in range(300):
        data = bytearray(good)
        at = int(rng.integers(0, 348))
        data[at : at + 4] = struct.pack("<I", int(rng.integers(0, 2**32)))
        path.write_bytes(data)
        try:
            volume = read_volume(path)
            assert volume.voxels.ndim == 3
            assert np.isfinite(volume.affine_lps).all()
        except InputError:
            refusals += 1
    assert 0 < refusals < 300
