"""Reading a radiograph: PNG, JPEG or DICOM to one channel in [0, 1], bright where the film is bright."""

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
"""A film at 0.1 mm has some 18 million; more than this is a mistake or a decompression bomb."""

PERCENTILES = (0.5, 99.5)
"""Of 16-bit and DICOM images, taken to 0 and 1: their range is the detector's, and a burnt-in marker its maximum."""


def read_radiograph(path: Path, inverted: bool = False) -> NDArray[np.float32]:
    """Reads a radiograph as it is stored, turned only where EXIF says so.

    8-bit images are divided by 255. 16-bit PNG and DICOM are scaled between `PERCENTILES`; of DICOM, first the
    modality's slope and intercept and the first VOI window are applied, and MONOCHROME1 (0 is white) is inverted.
    Colour becomes luminance (ITU-R 601), transparency is ignored.

    Args:
        path: the file.
        inverted: a picture made of a MONOCHROME1 film without turning it, so that low values are white; turned here.
            DICOM says so itself and is not turned again.

    Returns:
        (H, W) float32 in [0, 1].

    Raises:
        InputError: missing, damaged, truncated, empty, larger than `MAX_PIXELS`, several frames, another format.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected a radiograph, one PNG, JPEG or DICOM file")
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; expected a radiograph, correct the path") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the file and its rights") from error
    if not head:
        raise InputError(f"{path}: an empty file; expected a radiograph, copy it again")
    is_dicom = head[128:] == b"DICM"
    image = _read_dicom(path) if is_dicom else _read_picture(path)
    if inverted and not is_dicom:
        image = np.float32(1) - image
    if image.ndim != 2 or not image.size:
        raise InputError(f"{path}: an image of shape {image.shape}; expected rows and columns")
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
                    raise InputError(f"{path}: {frames} frames; expected one radiograph a file, split it")
                image.load()
                upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: neither PNG, JPEG nor DICOM, or damaged; convert it or copy it again") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}; expected at most {MAX_PIXELS:.0e} pixels, shrink the image") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be decoded ({error}); truncated or damaged, copy it again") from error
    if upright.mode.startswith("I"):  # 16 bits a pixel
        return _scaled(path, np.asarray(upright).astype(np.float32))
    # A picture with a palette goes through its colours, or its values would be numbers of palette entries.
    grey = upright.convert("RGB").convert("L") if upright.mode in ("P", "PA", "RGBA", "CMYK") else upright.convert("L")
    return np.asarray(grey, dtype=np.float32) / np.float32(255)


def _read_dicom(path: Path) -> NDArray[np.float32]:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    try:
        dataset: Any = pydicom.dcmread(path)
        frames, samples = int(dataset.get("NumberOfFrames") or 1), int(dataset.get("SamplesPerPixel") or 1)
        rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    except Exception as error:  # pydicom ends in any of a dozen types on a damaged file
        raise InputError(f"{path}: the DICOM header cannot be read ({error}); copy the file again") from error
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    if frames > 1 or samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise InputError(
            f"{path}: DICOM with {frames} frame(s), {samples} sample(s) a pixel, {photometric or 'no photometric'}; "
            "expected one radiograph in MONOCHROME1 or MONOCHROME2, export it again"
        )
    _check_pixels(path, rows, columns)
    try:
        values = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset, index=0)
    except Exception as error:  # as above, and one more for each missing decoder
        syntax = dataset.file_meta.get("TransferSyntaxUID") if "file_meta" in dir(dataset) else None
        raise InputError(
            f"{path}: the pixels cannot be decoded ({error}; transfer syntax {getattr(syntax, 'name', syntax)}); "
            "damaged, or to be decompressed first (for example gdcmconv --raw)"
        ) from error
    scaled = _scaled(path, np.asarray(values, dtype=np.float32))
    return np.float32(1) - scaled if photometric == "MONOCHROME1" else scaled


def _scaled(path: Path, values: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise InputError(f"{path}: NaN or infinite pixels; expected finite ones, export it again")
    low, high = np.percentile(values, PERCENTILES)
    if high <= low:  # almost all of one value: the few others are all there is to see
        low, high = float(values.min()), float(values.max())
    if high <= low:
        return np.zeros(values.shape, dtype=np.float32)
    return ((values - np.float32(low)) / np.float32(high - low)).clip(0, 1)
