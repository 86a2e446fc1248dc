"""Read NRRD and MetaImage (MHA, MHD) with SimpleITK, whose world axes are LPS.

SimpleITK (53 MB) is imported only when such a file is read; NIfTI and prepared volumes do not need it.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctx_distill.data.io.size_limits import check_size
from ctx_distill.errors import InputError

log = logging.getLogger(__name__)

_HEADER_BYTES = 1 << 16
_DATA_FILE = re.compile(rb"^\s*(?:ElementDataFile\s*=|data ?file:)\s*(.+?)\s*$", re.IGNORECASE | re.MULTILINE)
_COMPRESSED = re.compile(rb"^\s*(?:CompressedData\s*=\s*True|encoding:\s*(?:gz|gzip|bz2|bzip2))", re.IGNORECASE | re.M)
# MetaImage headers can define a linear map to the true values, which ITK's reader silently ignores.
_UNAPPLIED = re.compile(rb"^\s*ElementToIntensityFunction(Slope|Offset)\s*=\s*(\S+)\s*$", re.MULTILINE)
_NEUTRAL = {b"Slope": 1.0, b"Offset": 0.0}


def read_itk(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return voxels (k, j, i) with the file's fastest axis last, and their affine (4, 4) to LPS mm.

    Raises:
        InputError: a damaged file, a size that the file cannot hold, colour, or an intensity map in the header.
    """
    import SimpleITK as sitk

    item_bytes = {
        sitk.sitkInt8: 1, sitk.sitkUInt8: 1, sitk.sitkInt16: 2, sitk.sitkUInt16: 2, sitk.sitkInt32: 4,
        sitk.sitkUInt32: 4, sitk.sitkInt64: 8, sitk.sitkUInt64: 8, sitk.sitkFloat32: 4, sitk.sitkFloat64: 8,
    }  # fmt: skip
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    header = _text_header(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(
            f"{path}: cannot read the header ({reason(error)}); the file is damaged, copy it again"
        ) from error
    for name, value in _UNAPPLIED.findall(header):
        if _number(value) != _NEUTRAL[name]:
            intensity_map = f"ElementToIntensityFunction{name.decode()} = {value.decode('latin-1')}"
            raise InputError(
                f"{path}: {intensity_map} is not supported; expected stored values in HU, write the file without the map"
            )
    pixel_type = reader.GetPixelID()
    if reader.GetNumberOfComponents() != 1 or pixel_type not in item_bytes:
        raise InputError(
            f"{path}: {reader.GetNumberOfComponents()} values per voxel ({sitk.GetPixelIDValueAsString(pixel_type)}); "
            "expected one value in HU, not colour or complex numbers"
        )
    shape = tuple(int(n) for n in reader.GetSize())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    # bz2 compresses more than deflate, so the file size gives no bound; the limit on voxels still applies.
    packed = bool(_COMPRESSED.search(header))
    stored = None if packed and re.search(rb"bz", header[:_HEADER_BYTES]) else _stored_bytes(path, header)
    check_size(path, shape, item_bytes[pixel_type], stored, packed)
    if path.suffix.lower() in (".nrrd", ".nhdr") and not re.search(rb"^space( dimension)?:", header, re.M):
        log.warning("%s: no space field; assuming that the index increases towards Left, Posterior, Superior", path)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise InputError(
            f"{path}: cannot read the voxels ({reason(error)}); the file is truncated or damaged, copy it again"
        ) from error
    voxels: NDArray[Any] = sitk.GetArrayFromImage(image).reshape(shape[::-1])
    return voxels, _affine(image)


def reason(error: BaseException) -> str:
    """Return the last line of an ITK error, without the source files and line numbers before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


def _number(text: bytes) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _affine(image: Any) -> NDArray[np.float64]:
    n = image.GetDimension()
    direction = np.array(image.GetDirection(), dtype=np.float64).reshape(n, n)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = (direction * np.array(image.GetSpacing()[:3]))[:, ::-1]
    affine[:3, 3] = image.GetOrigin()[:3]
    return affine


def _text_header(path: Path) -> bytes:
    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
    if path.suffix.lower() in (".nrrd", ".nhdr"):
        return start.split(b"\n\n", 1)[0].split(b"\r\n\r\n", 1)[0]
    end = re.search(rb"^\s*ElementDataFile\s*=.*$", start, re.M)
    return start[: end.end()] if end else start


def _stored_bytes(path: Path, header: bytes) -> int | None:
    """Return the bytes that can hold voxels, of this file or of the data file that the header names.

    The header may name only files in its own folder, so that images stay in the folder of the manifest.
    """
    match = _DATA_FILE.search(header)
    name = match.group(1).decode("utf-8", errors="replace") if match else "LOCAL"
    if name.upper() == "LOCAL":
        return path.stat().st_size
    listed = name.upper().startswith("LIST")
    for other in _listed(path) if listed else [name]:
        if Path(other).is_absolute() or ".." in Path(other).parts:
            raise InputError(
                f"{path}: the header refers to {other!r} outside its folder; move that file next to the header"
            )
    if "%" in name or " " in name or listed:
        return None
    data = path.parent / name
    if not data.is_file():
        raise InputError(
            f"{path}: the header refers to {name!r}, which does not exist; put that file next to the header"
        )
    return data.stat().st_size


def _listed(path: Path) -> list[str]:
    """Return the files listed after LIST in a header, one per line."""
    with path.open("rb") as file:
        text = file.read(_HEADER_BYTES).decode("utf-8", errors="replace")
    after = re.split(r"(?im)^\s*(?:ElementDataFile\s*=|data ?file:)\s*LIST.*$", text, maxsplit=1)
    return [line.strip() for line in after[-1].splitlines() if line.strip()]
