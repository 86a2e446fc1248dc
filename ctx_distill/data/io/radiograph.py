"""Read a radiograph (PNG, JPEG or DICOM) as one channel in [0, 1], where 1 is bright."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ctx_distill.errors import InputError

MAX_PIXELS = 100_000_000
"""A radiograph at 0.1 mm has about 18 million pixels; more than this limit is an error or a decompression bomb."""

PERCENTILES = (0.5, 99.5)
"""Percentiles of 16-bit and DICOM images that are mapped to 0 and 1.

Their full range is the detector's, and burnt-in markers are at its maximum.
"""


def read_radiograph(path: Path, inverted: bool = False) -> NDArray[np.float32]:
    """Read a radiograph in its stored orientation, rotated only as EXIF requires.

    8-bit images are divided by 255. 16-bit PNG and DICOM are scaled between `PERCENTILES`. For DICOM, the modality's
    slope and intercept and the first VOI window are applied first, and MONOCHROME1 (0 is white) is inverted.
    Colour is converted to luminance (ITU-R 601), and transparency is ignored.

    Args:
        path: image file.
        inverted: whether a PNG or JPEG was exported from MONOCHROME1 without inversion, so that low values are
            white; it is inverted here. Ignored for DICOM, which declares its polarity.

    Returns:
        (H, W) float32 in [0, 1].

    Raises:
        InputError: a missing, damaged, truncated or empty file, more than `MAX_PIXELS` pixels, several frames, or an
            unsupported format.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected one PNG, JPEG or DICOM file")
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; expected a radiograph, correct the path") from error
    except OSError as error:
        raise InputError(
            f"{path}: cannot read the file ({error.strerror}); check the file and its permissions"
        ) from error
    if not head:
        raise InputError(f"{path}: empty file; expected a radiograph, copy it again")
    is_dicom = head[128:] == b"DICM"
    image = _read_dicom(path) if is_dicom else _read_picture(path)
    if inverted and not is_dicom:
        image = np.float32(1) - image
    if image.ndim != 2 or not image.size:
        raise InputError(f"{path}: image of shape {image.shape}; expected rows and columns")
    return image


def _check_pixels(path: Path, rows: int, columns: int) -> None:
    if rows < 1 or columns < 1:
        raise InputError(f"{path}: {rows} x {columns} pixels; expected a radiograph, copy it again")
    if rows * columns > MAX_PIXELS:
        raise InputError(f"{path}: {rows} x {columns} pixels; expected at most {MAX_PIXELS:.0e}, shrink the image")


def _read_picture(path: Path) -> NDArray[np.float32]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_check_pixels` decides
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                _check_pixels(path, image.height, image.width)
                frames = getattr(image, "n_frames", 1)
                if frames > 1:
                    raise InputError(f"{path}: {frames} frames; expected one radiograph per file, split it")
                image.load()
                upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path}: not a readable PNG, JPEG or DICOM file; convert it, or copy it again if it is damaged"
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}; expected at most {MAX_PIXELS:.0e} pixels, shrink the image") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: cannot decode the image ({error}); the file is truncated or damaged, copy it again"
        ) from error
    if upright.mode.startswith("I"):  # 16 bits per pixel
        return _scaled(path, np.asarray(upright).astype(np.float32))
    # Convert palette images to their colours first, since their values are palette indices.
    grey = upright.convert("RGB").convert("L") if upright.mode in ("P", "PA", "RGBA", "CMYK") else upright.convert("L")
    return np.asarray(grey, dtype=np.float32) / np.float32(255)


def _read_dicom(path: Path) -> NDArray[np.float32]:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    try:
        dataset: Any = pydicom.dcmread(path)
        frames, samples = int(dataset.get("NumberOfFrames") or 1), int(dataset.get("SamplesPerPixel") or 1)
        rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    except Exception as error:  # pydicom raises a dozen exception types on damaged files
        raise InputError(f"{path}: cannot read the DICOM header ({error}); copy the file again") from error
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    if frames > 1 or samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise InputError(
            f"{path}: DICOM with {frames} frame(s), {samples} sample(s) per pixel, {photometric or 'no photometric'}; "
            "expected one radiograph in MONOCHROME1 or MONOCHROME2, export it again"
        )
    _check_pixels(path, rows, columns)
    try:
        values = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset, index=0)
    except Exception as error:  # as above, plus one type per missing decoder
        syntax = dataset.file_meta.get("TransferSyntaxUID") if "file_meta" in dir(dataset) else None
        raise InputError(
            f"{path}: cannot decode the pixels ({error}; transfer syntax {getattr(syntax, 'name', syntax)}); "
            "the file is damaged or must be decompressed first (for example gdcmconv --raw)"
        ) from error
    scaled = _scaled(path, np.asarray(values, dtype=np.float32))
    return np.float32(1) - scaled if photometric == "MONOCHROME1" else scaled


def _scaled(path: Path, values: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise InputError(f"{path}: NaN or infinite pixels; expected finite values, export it again")
    low, high = np.percentile(values, PERCENTILES)
    if high <= low:  # almost constant: use the full range to show the few other values
        low, high = float(values.min()), float(values.max())
    if high <= low:
        return np.zeros(values.shape, dtype=np.float32)
    return ((values - np.float32(low)) / np.float32(high - low)).clip(0, 1)
