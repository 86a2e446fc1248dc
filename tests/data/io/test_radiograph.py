"""Radiographs of every kind, against the pixels that were written."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

from ctx_distill.data.io.radiograph import read_radiograph
from ctx_distill.types import InputError


def grey() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)


def deep() -> NDArray[np.uint16]:
    return np.random.default_rng(1).integers(1000, 4000, (20, 30), dtype=np.uint16)


def scaled(values: NDArray[Any]) -> NDArray[np.float64]:
    low, high = np.percentile(values, (0.5, 99.5))
    return np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)


def dicom(path: Path, pixels: NDArray[Any], **tags: Any) -> Path:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    for key, value in tags.items():
        setattr(ds, key, value)
    ds.PixelData = pixels.tobytes()
    ds.save_as(path, enforce_file_format=True)
    return path


def refused(path: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_radiograph(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_eight_bits_are_divided_by_255(tmp_path: Path) -> None:
    Image.fromarray(grey()).save(tmp_path / "a.png")
    image = read_radiograph(tmp_path / "a.png")
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, grey() / 255, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_grey_in_other_modes_is_the_same_grey(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(grey())
    if mode == "P":  # a palette upside down: entry i is the grey 255 - i
        picture = Image.fromarray(255 - grey(), mode="L")
        picture.putpalette([255 - i for i in range(256) for _ in range(3)])
    else:
        picture = picture.convert(mode)
    picture.save(tmp_path / "a.png")
    np.testing.assert_allclose(read_radiograph(tmp_path / "a.png"), grey() / 255, atol=1e-6)


def test_transparency_is_ignored(tmp_path: Path) -> None:
    rgba = np.dstack([grey()] * 3 + [np.zeros_like(grey())])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_allclose(read_radiograph(tmp_path / "a.png"), grey() / 255, atol=1e-6)


def test_one_bit(tmp_path: Path) -> None:
    Image.fromarray(grey() > 128).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_radiograph(tmp_path / "a.png"), grey() > 128)


def test_jpeg(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(40) * 2, np.arange(60) * 2).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpeg", quality=95)
    np.testing.assert_allclose(read_radiograph(tmp_path / "a.jpeg"), smooth / 255, atol=0.02)


def test_sixteen_bits_are_scaled_between_percentiles(tmp_path: Path) -> None:
    Image.fromarray(deep()).save(tmp_path / "a.png")
    np.testing.assert_allclose(read_radiograph(tmp_path / "a.png"), scaled(deep()), atol=1e-5)
    Image.fromarray(np.full((5, 6), 700, np.uint16)).save(tmp_path / "flat.png")
    assert not read_radiograph(tmp_path / "flat.png").any()


@pytest.mark.parametrize("suffix", ["png", "jpeg"])
def test_exif_turns_the_picture(tmp_path: Path, suffix: str) -> None:
    smooth = np.add.outer(np.arange(40) * 3, np.arange(60)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    Image.fromarray(smooth).save(tmp_path / f"a.{suffix}", exif=exif)
    np.testing.assert_allclose(read_radiograph(tmp_path / f"a.{suffix}"), np.rot90(smooth, -1) / 255, atol=0.03)


def test_dicom_is_bright_where_the_film_is_bright(tmp_path: Path) -> None:
    image = read_radiograph(dicom(tmp_path / "a.dcm", deep()))
    np.testing.assert_allclose(image, scaled(deep()), atol=1e-5)
    inverse = read_radiograph(dicom(tmp_path / "b.dcm", deep(), PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_allclose(inverse, 1 - scaled(deep()), atol=1e-5)


def test_dicom_slope_and_window(tmp_path: Path) -> None:
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1000, "RescaleType": "US"}
    window = {"WindowCenter": [4000, 1], "WindowWidth": [2001, 1]}
    image = read_radiograph(dicom(tmp_path / "a", deep(), **tags, **window))
    # PS3.3 C.11.2.1.2: linear between centre - 0.5 -+ (width - 1) / 2, of the values after slope and intercept.
    values = deep().astype(np.float64) * 2 - 1000
    np.testing.assert_allclose(image, scaled(np.clip((values - 3999.5) / 2000 + 0.5, 0, 1)), atol=1e-5)


def test_refusals(tmp_path: Path) -> None:
    refused(tmp_path / "none.png", "no such file")
    refused(tmp_path, "folder")
    for name, data in (("a.png", b""), ("b.png", b"not an image at all")):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name)
    Image.fromarray(grey()).save(tmp_path / "c.gif")
    refused(tmp_path / "c.gif", "not a readable PNG")
    for name in ("d.png", "d.jpeg"):
        Image.fromarray(np.kron(grey(), np.ones((8, 8), np.uint8))).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        refused(tmp_path / name, "truncated")


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (11_000, 60_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        (tmp_path / "a.png").write_bytes(png + chunk(b"IEND", b""))
        refused(tmp_path / "a.png", "pixels")


def test_several_frames_are_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(grey()), Image.fromarray(255 - grey())]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    refused(tmp_path / "a.png", "2 frames")
    refused(dicom(tmp_path / "b.dcm", np.stack([deep()] * 2), Rows=20, Columns=30, NumberOfFrames=2), "2 frame")
    refused(
        dicom(tmp_path / "c.dcm", np.dstack([deep()] * 3), SamplesPerPixel=3, PhotometricInterpretation="RGB"), "RGB"
    )


def test_damaged_dicom(tmp_path: Path) -> None:
    path = dicom(tmp_path / "a.dcm", deep())
    data = path.read_bytes()
    path.write_bytes(data[:-200])
    refused(path, "cannot decode the pixels")
    path.write_bytes(data[:140])
    refused(path)


def test_every_cut_of_a_png_is_refused_by_name(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(grey()).save(buffer, "png")
    data = buffer.getvalue()
    for length in range(1, len(data) - 16, 7):
        (tmp_path / "a.png").write_bytes(data[:length])
        refused(tmp_path / "a.png")
