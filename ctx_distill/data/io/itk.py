"""NRRD and MetaImage (MHA, MHD) through SimpleITK, whose world axes are LPS already.

SimpleITK is imported when a file is read: NIfTI and prepared volumes do without its 53 MB.
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
# MetaImage can hold a linear map to the true values, and ITK's reader leaves it unapplied without a word.
_UNAPPLIED = re.compile(rb"^\s*ElementToIntensityFunction(Slope|Offset)\s*=\s*(\S+)\s*$", re.MULTILINE)
_NEUTRAL = {b"Slope": 1.0, b"Offset": 0.0}


def read_itk(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Voxels as (k, j, i), the file's fastest axis last, and their affine to LPS mm."""
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
            f"{path}: the header cannot be read ({reason(error)}); the file is damaged, copy it again"
        ) from error
    for name, value in _UNAPPLIED.findall(header):
        if _number(value) != _NEUTRAL[name]:
            told = f"ElementToIntensityFunction{name.decode()} = {value.decode('latin-1')}"
            raise InputError(f"{path}: {told}; expected HU without a further map, write the file with true values")
    kind = reader.GetPixelID()
    if reader.GetNumberOfComponents() != 1 or kind not in item_bytes:
        raise InputError(
            f"{path}: {reader.GetNumberOfComponents()} numbers a voxel ({sitk.GetPixelIDValueAsString(kind)}); "
            "expected one in HU, colour or complex volumes are not CT"
        )
    shape = tuple(int(n) for n in reader.GetSize())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    # bz2 packs tighter than deflate can, so its file size bounds nothing; the cap on voxels still does.
    packed = bool(_COMPRESSED.search(header))
    stored = None if packed and re.search(rb"bz", header[:_HEADER_BYTES]) else _stored_bytes(path, header)
    check_size(path, shape, item_bytes[kind], stored, packed)
    if path.suffix.lower() in (".nrrd", ".nhdr") and not re.search(rb"^space( dimension)?:", header, re.M):
        log.warning("%s: no space field; its orientation is a guess (index grows to Left, Posterior, Superior)", path)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise InputError(
            f"{path}: the voxels cannot be read ({reason(error)}); truncated or damaged, copy it again"
        ) from error
    voxels: NDArray[Any] = sitk.GetArrayFromImage(image).reshape(shape[::-1])
    return voxels, _affine(image)


def reason(error: BaseException) -> str:
    """ITK's own words out of its many lines of file names and line numbers."""
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
    """Bytes that can hold voxels: the file itself, or the one other file that the header names.

    A header may not name files elsewhere: a manifest's images stay in its folder.
    """
    match = _DATA_FILE.search(header)
    name = match.group(1).decode("utf-8", errors="replace") if match else "LOCAL"
    if name.upper() == "LOCAL":
        return path.stat().st_size
    listed = name.upper().startswith("LIST")
    for other in _listed(path) if listed else [name]:
        if Path(other).is_absolute() or ".." in Path(other).parts:
            raise InputError(f"{path}: its voxels are said to be in {other!r}; put that file beside the header")
    if "%" in name or " " in name or listed:
        return None
    data = path.parent / name
    if not data.is_file():
        raise InputError(
            f"{path}: its voxels are said to be in {name!r}, which does not exist; put it beside the header"
        )
    return data.stat().st_size


def _listed(path: Path) -> list[str]:
    """The files that follow a header's LIST, one a line."""
    with path.open("rb") as file:
        text = file.read(_HEADER_BYTES).decode("utf-8", errors="replace")
    after = re.split(r"(?im)^\s*(?:ElementDataFile\s*=|data ?file:)\s*LIST.*$", text, maxsplit=1)
    return [line.strip() for line in after[-1].splitlines() if line.strip()]
