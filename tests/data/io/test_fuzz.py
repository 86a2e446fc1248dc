"""Headers and bytes changed at random (from fixed seeds): a value or a named error, never a crash, a hang or a wrong volume."""

from __future__ import annotations

import gzip
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ctx_distill.data.io.volume import Volume, read_volume
from ctx_distill.errors import InputError

SHAPE = (7, 6, 5)
AFFINE = np.array([[-0.7, 0, 0, 10], [0, -0.8, 0, 20], [0, 0, 2.5, -30], [0, 0, 0, 1]])
FUZZ = settings(
    max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # fmt: skip


def hu() -> NDArray[np.int16]:
    return np.random.default_rng(4).integers(-1000, 1500, SHAPE).astype(np.int16)


def nifti(path: Path) -> bytes:
    nib.Nifti1Image(hu().transpose(2, 1, 0), AFFINE).to_filename(path)
    return path.read_bytes()


def outcome(path: Path, data: bytes) -> Volume | None:
    """The volume, or None where it was refused by name; anything else fails the test."""
    path.write_bytes(data)
    try:
        return read_volume(path)
    except InputError as error:
        told = str(error)
    assert told.startswith(str(path))
    return None


edits = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6)


def edited(data: bytes, changes: list[tuple[int, int]], below: int) -> bytes:
    changed = bytearray(data)
    for place, value in changes:
        changed[place % below] = value
    return bytes(changed)


@FUZZ
@given(changes=edits)
def test_nifti_headers_agree_with_nibabel_or_are_refused(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    """What is read is what nibabel reads from the same bytes: voxels and, in LPS and mm, their place."""
    path = tmp_path / "a.nii"
    data = edited(nifti(path), changes, 352)
    ours = outcome(path, data)
    if ours is None:
        return
    image = (nib.Nifti1Image if data[344:347] == b"n+1" else nib.Nifti2Image).from_bytes(data)
    theirs = np.asarray(image.get_fdata()).reshape(ours.voxels.shape[::-1])
    np.testing.assert_allclose(ours.voxels.transpose(2, 1, 0), theirs, rtol=1e-5, atol=1e-3)
    if image.header.get_xyzt_units()[0] in ("mm", "unknown"):
        expected = (np.diag([-1, -1, 1, 1]) @ image.affine)[:, [2, 1, 0, 3]]
        np.testing.assert_allclose(ours.affine_lps, expected, rtol=1e-5, atol=1e-4)


@FUZZ
@given(changes=edits)
def test_nifti_bodies_change_where_they_were_changed(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    path = tmp_path / "a.nii"
    data = nifti(path)
    body = edited(data[352:], changes, len(data) - 352)
    ours = outcome(path, data[:352] + body)
    assert ours is not None
    np.testing.assert_array_equal(ours.voxels.ravel(), np.frombuffer(body, dtype="<i2"))


@FUZZ
@given(changes=edits, cut=st.integers(0, 400), tail=st.binary(max_size=40))
def test_gzip_gives_the_same_voxels_or_is_refused(
    tmp_path: Path, changes: list[tuple[int, int]], cut: int, tail: bytes
) -> None:
    """A checksum stands over the whole stream, so that no damage of it may come through as another volume."""
    path = tmp_path / "a.nii"
    packed = gzip.compress(nifti(path), mtime=0)
    path = tmp_path / "a.nii.gz"
    data = edited(packed, changes, len(packed))[: len(packed) - (cut if cut < 40 else 0)] + tail
    ours = outcome(path, data)
    if ours is None:
        return
    try:
        whole = zlib.decompress(data, wbits=31)
    except zlib.error:
        whole = gzip.decompress(packed)
    np.testing.assert_array_equal(ours.voxels.ravel(), np.frombuffer(whole[352:], dtype="<i2")[: ours.voxels.size])


@FUZZ
@given(changes=edits, cut=st.integers(0, 200))
def test_npz(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, ct=hu())
    data = path.read_bytes()
    ours = outcome(path, edited(data, changes, len(data))[: len(data) - (cut if cut < 60 else 0)])
    if ours is not None:
        np.testing.assert_array_equal(ours.voxels, hu())


READ_ALL = """
import sys
from pathlib import Path
from ctx_distill.data.io.volume import read_volume
from ctx_distill.errors import InputError
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        volume = read_volume(path)
        print(path.name, "value", *volume.voxels.shape, int(volume.voxels.astype("int64").sum()), flush=True)
    except InputError as error:
        assert str(path) in str(error), error
        print(path.name, "refused", flush=True)
"""


def mutants(good: bytes, header: int, count: int, seed: int) -> list[bytes]:
    """Edits of the header, of the body, and cuts, in equal parts."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        data = bytearray(good)
        if number % 3 == 0:
            for _ in range(int(rng.integers(1, 5))):
                data[int(rng.integers(0, header))] = int(rng.integers(0, 256))
        elif number % 3 == 1:
            for _ in range(int(rng.integers(1, 5))):
                data[int(rng.integers(header, len(data)))] ^= int(rng.integers(1, 256))
        else:
            data = data[: int(rng.integers(1, len(data)))]
        found.append(bytes(data))
    return found


def read_in_a_child(folder: Path) -> list[list[str]]:
    """One process reads all; a crash of a C library is its exit status."""
    done = subprocess.run([sys.executable, "-c", READ_ALL, str(folder)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.stderr[-2000:])
    lines = [line.split() for line in done.stdout.splitlines() if line.split()[1:2] in (["value"], ["refused"])]
    assert len(lines) == sum(1 for _ in folder.iterdir())
    return lines


@pytest.mark.full
@pytest.mark.parametrize("kind", ["nrrd", "mha"])
@pytest.mark.parametrize("packed", [False, True])
def test_nrrd_and_mha(tmp_path: Path, kind: str, packed: bool) -> None:
    image = sitk.GetImageFromArray(hu())
    image.SetSpacing((0.7, 0.8, 2.5))
    source = tmp_path / f"good.{kind}"
    sitk.WriteImage(image, str(source), packed)
    good = source.read_bytes()
    mark = b"\n\n" if kind == "nrrd" else b"ElementDataFile = LOCAL\n"
    header = good.index(mark) + len(mark)
    folder = tmp_path / "mutants"
    folder.mkdir()
    for number, data in enumerate(mutants(good, header, 150, seed=8)):
        (folder / f"{number:03}.{kind}").write_bytes(data)
    lines = read_in_a_child(folder)
    values = [line for line in lines if line[1] == "value"]
    assert len(values) < len(lines)
    # a body that was changed has at most four other voxels; a cut one is no volume
    for line in values:
        number = int(line[0].split(".")[0])
        assert number % 3 != 2 or packed, line
        if number % 3 == 1 and not packed:
            assert line[2:5] == [str(n) for n in SHAPE]
            assert abs(int(line[5]) - int(hu().astype(np.int64).sum())) <= 4 * 65535


@pytest.mark.full
def test_dicom_slices(tmp_path: Path) -> None:
    """One slice of a series changed; the pixels of the other slices must come through where anything does."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    def write(path: Path, plane: NDArray[np.int16], number: int) -> None:
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(number)])
        ds: Any = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.Modality, ds.SeriesInstanceUID, ds.InstanceNumber = "CT", "1.2.3", number
        ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 2.5 * number]
        ds.Rows, ds.Columns, ds.PixelSpacing = *plane.shape, [0.8, 0.7]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleSlope, ds.RescaleIntercept, ds.PixelData = 1, 0, plane.tobytes()
        ds.save_as(path, enforce_file_format=True)

    good = tmp_path / "good"
    good.mkdir()
    for number, plane in enumerate(hu()):
        write(good / f"{number}.dcm", plane, number)
    whole = (good / "3.dcm").read_bytes()
    folder = tmp_path / "mutants"
    for number, data in enumerate(mutants(whole, len(whole) - 60, 90, seed=9)):
        one = folder / f"{number:03}"
        one.mkdir(parents=True)
        for path in good.iterdir():
            (one / path.name).write_bytes(data if path.name == "3.dcm" else path.read_bytes())
    lines = read_in_a_child(folder)
    kinds = {line[1] for line in lines}
    assert kinds == {"value", "refused"}
    for line in lines:
        assert line[1] == "refused" or line[3:5] == [str(n) for n in SHAPE[1:]], line
