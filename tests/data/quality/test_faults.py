"""Faults of files as they come from hospitals and downloads: each ends in the right value or in a named error."""

from __future__ import annotations

import gzip
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

from ctx_distill.data.io.volume import read_volume
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.errors import InputError

AXIAL = [1, 0, 0, 0, 1, 0]


def slices(folder: Path, count: int = 12, **tags: Any) -> Path:
    """An axial series whose slice n holds n."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = generate_uid(entropy_srcs=[str(folder)])
    for number in range(count):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = tags.get("SOPClassUID", CTImageStorage)
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        ds.Modality, ds.SeriesInstanceUID, ds.InstanceNumber = "CT", uid, number
        ds.ImageOrientationPatient, ds.ImagePositionPatient = AXIAL, [0, 0, 2.0 * number]
        ds.Rows, ds.Columns, ds.PixelSpacing = 6, 7, [0.9, 0.8]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
        ds.PixelData = np.full((6, 7), number, dtype=np.int16).tobytes()
        for name, value in tags.items():
            setattr(ds, name, value)
        ds.save_as(folder / f"{number:03}.dcm", enforce_file_format=True)
    return folder


def change(path: Path, **tags: Any) -> None:
    ds = pydicom.dcmread(path)
    for name, value in tags.items():
        if name == "PixelPaddingValue":
            ds.add_new("PixelPaddingValue", "SS", value)
        else:
            setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)


def refused(path: Path, *words: str) -> str:
    with pytest.raises(InputError) as caught:
        read_volume(path)
    for word in (path.name, *words):
        assert word in str(caught.value)
    return str(caught.value)


def test_the_series_itself_is_sound(tmp_path: Path) -> None:
    scan = read_volume(slices(tmp_path / "s"))
    assert scan.voxels[:, 0, 0].tolist() == [n - 1024 for n in range(12)]
    np.testing.assert_allclose(scan.spacing, (2.0, 0.9, 0.8))


def test_enhanced_multi_frame(tmp_path: Path) -> None:
    folder = slices(tmp_path / "s", 1, SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=5)
    refused(folder / "000.dcm", "single DICOM file")
    with pytest.raises(InputError, match=r"multi-frame DICOM .5 frames.; expected one slice per file, convert it"):
        read_volume(folder)


def test_gantry_tilt(tmp_path: Path) -> None:
    """Slices 2 mm apart along z that also slip along y: the affine is sheared, and a point lies where it was."""
    folder = slices(tmp_path / "s")
    for number in range(12):
        change(folder / f"{number:03}.dcm", ImagePositionPatient=[0, 0.5 * number, 2.0 * number])
    scan = read_volume(folder)
    np.testing.assert_allclose(scan.affine_lps @ [5, 0, 0, 1], [0, 2.5, 10, 1], atol=1e-9)
    np.testing.assert_allclose(scan.affine_lps @ [5, 3, 2, 1], [1.6, 2.5 + 2.7, 10, 1], atol=1e-9)


def test_mixed_orientations_in_one_series(tmp_path: Path) -> None:
    folder = slices(tmp_path / "s")
    change(folder / "004.dcm", ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    refused(folder / "004.dcm", "single")
    with pytest.raises(
        InputError, match=r"004.dcm: ImageOrientationPatient .* expected the same geometry for all slices"
    ):
        read_volume(folder)


def test_padding_outside_the_scanners_circle_is_air(tmp_path: Path) -> None:
    folder = slices(tmp_path / "s")
    for number in range(12):
        pixels = np.full((6, 7), 1024, dtype=np.int16)
        pixels[0] = -2000
        change(folder / f"{number:03}.dcm", PixelPaddingValue=-2000, PixelData=pixels.tobytes())
    scan = read_volume(folder)
    assert set(scan.voxels[:, 0].ravel().tolist()) == {-1024}
    assert set(scan.voxels[:, 1:].ravel().tolist()) == {0}


def test_a_transfer_syntax_that_cannot_be_decoded(tmp_path: Path) -> None:
    """Encapsulated noise said to be JPEG 2000, and bytes that only look like DICOM, as encryption leaves them."""
    folder = slices(tmp_path / "s")
    for path in sorted(folder.iterdir()):
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
        ds.PixelData = pydicom.encaps.encapsulate([b"\x00\x01" * 40])
        ds["PixelData"].is_undefined_length = True
        ds.save_as(path, enforce_file_format=True)
    with pytest.raises(InputError, match=r"cannot decode the pixels .*transfer syntax"):
        read_volume(folder)
    for path in sorted(folder.iterdir()):
        path.write_bytes(b"\0" * 128 + b"DICM" + np.random.default_rng(0).bytes(400))
    with pytest.raises(InputError, match=r"000.dcm: the DICOM header is damaged|no DICOM slices among its 12 files"):
        read_volume(folder)


def test_slices_that_claim_too_much(tmp_path: Path) -> None:
    """12 slices of 18,000 x 18,000 pixels, 7.8 GB, said of files of a kilobyte; and more than any scan has."""
    folder = slices(tmp_path / "s")
    for number in range(12):
        change(folder / f"{number:03}.dcm", Rows=18_000, Columns=18_000)
    refused(folder, "the header declares 12 x 18000 x 18000", "can hold at most")
    for number in range(12):
        change(folder / f"{number:03}.dcm", Rows=60_000, Columns=60_000)
    refused(folder, "the header declares 12 x 60000 x 60000", "expected at most 4e+09")


@pytest.mark.parametrize("missing", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_slices_that_cannot_be_placed(tmp_path: Path, missing: str) -> None:
    folder = slices(tmp_path / "s")
    ds = pydicom.dcmread(folder / "003.dcm")
    delattr(ds, missing)
    ds.save_as(folder / "003.dcm", enforce_file_format=True)
    with pytest.raises(InputError, match=rf"003.dcm: {missing} is None"):
        read_volume(folder)


def test_a_colour_slice(tmp_path: Path) -> None:
    folder = slices(tmp_path / "s")
    change(
        folder / "002.dcm", SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0,
        BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0, PixelData=b"\0" * (6 * 7 * 3),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"002.dcm: 3 samples per pixel"):
        read_volume(folder)


def test_a_slice_that_vanishes_between_header_and_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = slices(tmp_path / "s")
    from ctx_distill.data.io import dicom

    check = dicom.check_size

    def vanish(*arguments: Any, **named: Any) -> None:
        (folder / "005.dcm").unlink()
        check(*arguments, **named)

    monkeypatch.setattr(dicom, "check_size", vanish)
    with pytest.raises(InputError, match="s: cannot decode the pixels"):
        read_volume(folder)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.npz"])
def test_a_directory_where_a_file_should_be(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    refused(tmp_path / name, "no DICOM slices among its 0 files")


@pytest.mark.parametrize("inside", [True, False])
def test_links_in_a_manifest(tmp_path: Path, inside: bool) -> None:
    """A link within the folder is a file like others; one that leads out is refused."""
    data = tmp_path / "data"
    data.mkdir()
    target = (data if inside else tmp_path) / "real.nii.gz"
    nib.Nifti1Image(np.zeros((4, 4, 4), dtype=np.int16), np.eye(4)).to_filename(target)
    (data / "a.nii.gz").symlink_to(target)
    (data / "ct.csv").write_text("study_id,patient_id,split,image_path,findings,impression\ns,p,train,a.nii.gz,,x\n")
    if inside:
        assert read_volume(read_manifest(data / "ct.csv").image_file(0)).voxels.shape == (4, 4, 4)
        return
    with pytest.raises(InputError, match="outside the manifest's folder"):
        read_manifest(data / "ct.csv")
    # the same under a root of its own
    (tmp_path / "else").mkdir()
    (tmp_path / "else/ct.csv").write_text(
        f"study_id,patient_id,split,image_path,findings,impression,root\ns,p,train,a.nii.gz,,x,{data}\n"
    )
    with pytest.raises(InputError, match="outside the manifest's folder"):
        read_manifest(tmp_path / "else/ct.csv")
    (tmp_path / "else/ct.csv").write_text(
        "study_id,patient_id,split,image_path,findings,impression,root\ns,p,train,a.nii.gz,,x,nowhere\n"
    )
    with pytest.raises(InputError, match="'nowhere', which is not a folder"):
        read_manifest(tmp_path / "else/ct.csv")


def test_links_in_a_folder_of_slices(tmp_path: Path) -> None:
    """A folder's slices stay under the manifest's folder too."""
    series = slices(tmp_path / "data/s")
    (tmp_path / "data/ct.csv").write_text("study_id,patient_id,split,image_path,findings,impression\ns,p,train,s,,x\n")
    (series / "000.dcm").rename(tmp_path / "data/000.dcm")
    (series / "000.dcm").symlink_to("../000.dcm")
    assert len(read_volume(read_manifest(tmp_path / "data/ct.csv").image_file(0)).voxels) == 12
    (tmp_path / "data/000.dcm").rename(tmp_path / "000.dcm")
    (series / "000.dcm").unlink()
    (series / "000.dcm").symlink_to("../../000.dcm")
    with pytest.raises(InputError, match=r"'s/000.dcm', which leads to .*/000.dcm, outside the manifest's folder"):
        read_manifest(tmp_path / "data/ct.csv")


@pytest.mark.parametrize("place", ["../a.raw", "{}/a.raw", "LIST"])
@pytest.mark.parametrize("name", ["a.mhd", "a.nhdr"])
def test_a_header_whose_voxels_lie_elsewhere(tmp_path: Path, name: str, place: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 4, 4), dtype=np.int16)), str(folder / name))
    assert read_volume(folder / name).voxels.shape == (4, 4, 4)
    raw = next(path for path in folder.iterdir() if path.suffix == ".raw")
    raw.rename(tmp_path / "a.raw")
    listed = "LIST 3\n../a.raw" if name == "a.nhdr" else "LIST\n../a.raw"
    told = listed if place == "LIST" else place.format(tmp_path)
    (folder / name).write_text((folder / name).read_text().replace(raw.name, told))
    refused(folder / name, "a.raw", "move that file next to the header")


def test_a_gzip_bomb_is_refused_before_it_goes_off(tmp_path: Path) -> None:
    """4 GB of zeros in 4 MB: the header says 512 x 512 x 8000 and the file could hold them; a small header could not."""
    header = nib.Nifti1Header()
    header.set_data_shape((64, 64, 64))
    header.set_data_dtype(np.int16)
    header["magic"], header["vox_offset"] = b"n+1", 352
    path = tmp_path / "a.nii.gz"
    chunk = b"\0" * (1 << 24)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.binaryblock + b"\0" * 4)
        for _ in range(24):
            file.write(chunk)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, "continues after the voxels")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


READING = """
import resource, sys, torch
from pathlib import Path
from ctx_distill.data.quality.scan import check_scan
from ctx_distill.data.transforms.projection import square_projection
from ctx_distill.data.io.scan_file import ScanFile
from ctx_distill.data.transforms.model_volume import VolumeSpec, prepare_volume
torch.set_num_threads(1)
spec = VolumeSpec((3.0, 1.5, 1.5), (48, 96, 96))
def work(path):
    scan = ScanFile(Path(path), *(float(text) for text in sys.argv[4:]))
    if sys.argv[3] == "check":
        check_scan(scan)
        return
    volume = scan.read()
    prepare_volume(volume, spec)
    if sys.argv[3] == "project":
        square_projection(volume)
work(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
work(sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.full
@pytest.mark.parametrize("kind", ["nii.gz", "nrrd", "dicom"])
@pytest.mark.parametrize("oblique", [False, True])
def test_no_more_than_three_volumes_of_memory_a_worker(tmp_path: Path, kind: str, oblique: bool) -> None:
    """In a process of its own that has read a small scan before: what a large one adds to its highest resident memory."""
    size = (200, 384, 384)
    turn = np.radians(8.0) if oblique else 0.0
    direction = [np.cos(turn), -np.sin(turn), 0, np.sin(turn), np.cos(turn), 0, 0, 0, 1]
    paths = []
    for name, shape in (("small", (12, 24, 24)), ("large", size)):
        voxels = (np.arange(np.prod(shape), dtype=np.int64) // 700 % 900 - 1000).astype(np.int16).reshape(shape)
        image = sitk.GetImageFromArray(voxels)
        image.SetSpacing((0.8, 0.8, 1.5))
        image.SetDirection(direction)
        path = tmp_path / (name if kind == "dicom" else f"{name}.{kind}")
        if kind == "dicom":
            write_series(path, voxels, direction)
        else:
            sitk.WriteImage(image, str(path), True)
        paths.append(str(path))
    assert added(paths, "read") <= 3 * np.prod(size) * 2


@pytest.mark.full
@pytest.mark.parametrize(
    ("task", "stored", "scale"),
    [("project", "i2", ()), ("check", "i2", ()), ("read", "u2", (1, -1024)), ("project", "u2", (1, -1024))],
)
def test_memory_of_projections_checks_and_raw_values(
    tmp_path: Path, task: str, stored: str, scale: tuple[int, ...]
) -> None:
    """The same bound where the frontal projection is made, where `check` looks, and for values that a table takes to HU."""
    size = (200, 384, 384)
    paths = []
    for name, shape in (("small", (24, 24, 24)), ("large", size)):
        voxels = np.arange(np.prod(shape), dtype=np.int64).reshape(shape) // 700 % 900 + (0 if scale else -1000)
        image = sitk.GetImageFromArray(voxels.astype(stored))
        image.SetSpacing((0.8, 0.8, 1.5))
        path = tmp_path / f"{name}.nii.gz"
        sitk.WriteImage(image, str(path), True)
        paths.append(str(path))
    assert added(paths, task, *map(str, scale)) <= 3 * np.prod(size) * 2


def added(paths: list[str], *task: str) -> int:
    """Bytes that the second file adds to the process's highest resident memory after the first."""
    command = [sys.executable, "-c", READING, *paths, *task]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def write_series(folder: Path, voxels: np.ndarray[Any, Any], direction: list[float]) -> None:
    slices(folder, len(voxels))
    row, column = [direction[0], direction[3], direction[6]], [direction[1], direction[4], direction[7]]
    for plane, path in zip(voxels, sorted(folder.iterdir()), strict=True):
        change(
            path, Rows=plane.shape[0], Columns=plane.shape[1], PixelData=plane.tobytes(), RescaleIntercept=0,
            ImageOrientationPatient=[float(v) for v in (*row, *column)],
        )  # fmt: skip
