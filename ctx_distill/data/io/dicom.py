"""Read a folder of DICOM slices as one volume: select the series, order the slices by position, and reject gaps.

The geometry is computed here from the position of every slice, because ITK's series reader derives the slice spacing
from the first two slices and ignores gantry tilt. ITK's GDCM reader decodes the pixels and applies Rescale (once).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ctx_distill.data.io.itk import reason
from ctx_distill.data.io.size_limits import check_size
from ctx_distill.errors import InputError

log = logging.getLogger(__name__)

_TAGS = [
    "SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns",
    "RescaleSlope", "RescaleIntercept", "SamplesPerPixel", "NumberOfFrames", "PixelRepresentation",
    "PixelPaddingValue", "ImageType", "BitsAllocated", "SOPClassUID",
]  # fmt: skip
_NUMBERS = frozenset(_TAGS) - {"SeriesInstanceUID", "ImageType", "SOPClassUID", "PixelPaddingValue"}
CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
# Positions are stored with two or three decimals, so equal gaps differ slightly.
_GAP_RELATIVE, _GAP_MM = 0.05, 0.01
_ANGLE = 1e-3


@dataclass(frozen=True)
class _Slice:
    path: Path
    position: NDArray[np.float64]
    header: Any


def read_dicom_folder(folder: Path, series_uid: str | None = None) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Read one series of a folder of DICOM slices.

    Localizers and non-DICOM files are skipped; subfolders are not searched.

    Args:
        folder: folder that contains the slices.
        series_uid: series to read. By default the series with the most slices, with a warning if there are others.

    Returns:
        Voxels (slice, row, column) in HU with slices ordered along the normal, and their affine (4, 4) to LPS mm.

    Raises:
        InputError: no such series, a damaged or misplaced slice, or missing, duplicate or unevenly spaced slices.
    """
    series = _series(folder)
    if series_uid is not None and series_uid not in series:
        raise InputError(f"{folder}: no series {series_uid}; check that the slices were not moved")
    uid = series_uid or max(sorted(series), key=lambda key: len(series[key]))
    if len(series) > 1 and series_uid is None:
        sizes = ", ".join(str(len(group)) for group in series.values())
        log.warning("%s: found %d series (%s slices); reading the largest, %s", folder, len(series), sizes, uid)
    slices, row_step, column_step, slice_step = _ordered(folder, [_checked(*item) for item in series[uid]])
    first = slices[0].header
    shape = (len(slices), int(first.Rows), int(first.Columns))
    check_size(folder, shape, int(first.get("BitsAllocated") or 16) // 8, _native_bytes(slices), compressed=False)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([slice_step, row_step, column_step], axis=1)
    affine[:3, 3] = slices[0].position
    return _pixels(folder, slices, shape), affine


def _series(folder: Path) -> dict[str, list[tuple[Path, Any]]]:
    series: dict[str, list[tuple[Path, Any]]] = defaultdict(list)
    skipped = 0
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            continue
        header = _header(path)
        if header is None or "LOCALIZER" in (header.get("ImageType") or []):
            skipped += 1
            continue
        series[str(header.get("SeriesInstanceUID", ""))].append((path, header))
    if not series:
        raise InputError(
            f"{folder}: no DICOM slices among its {skipped} files; expected a folder with the slices of one series "
            "(subfolders are not searched)"
        )
    return series


def _header(path: Path) -> Any:
    """Return the header of a DICOM image with every value parsed, or None for other files.

    A damaged slice is rejected rather than skipped, because a volume without its first or last slice looks complete.
    """
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
        for name in _TAGS:
            value = header.get(name)
            if name in _NUMBERS and value is not None:
                np.array(value, dtype=np.float64)
    except pydicom.errors.InvalidDicomError:
        return None
    except Exception as error:  # pydicom raises a dozen exception types on damaged files
        raise InputError(f"{path}: damaged DICOM header ({error}); copy the file again") from error
    if header.get("Rows") is None or header.get("Columns") is None:
        if header.get("SOPClassUID") == CT_STORAGE:
            raise InputError(f"{path}: CT slice without Rows or Columns; the header is damaged, copy the file again")
        return None
    return header


def _checked(path: Path, header: Any) -> _Slice:
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise InputError(
            f"{path}: multi-frame DICOM ({header.NumberOfFrames} frames); expected one slice per file, convert it"
        )
    if int(header.get("SamplesPerPixel") or 1) != 1:
        raise InputError(
            f"{path}: {header.SamplesPerPixel} samples per pixel (colour); expected a CT slice, remove the file"
        )
    for name, count in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
        value = header.get(name)
        if value is None or len(value) != count or not np.isfinite(np.array(value, dtype=np.float64)).all():
            raise InputError(f"{path}: {name} is {value}; expected {count} finite numbers to position the slice")
    return _Slice(path, np.array(header.ImagePositionPatient, dtype=np.float64), header)


def _ordered(
    folder: Path, slices: list[_Slice]
) -> tuple[list[_Slice], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the slices ordered along the normal, and the steps in mm between rows, columns and slices."""
    first = slices[0].header
    for item in slices[1:]:
        for name, tolerance in (("ImageOrientationPatient", _ANGLE), ("PixelSpacing", 1e-4)):
            a, b = (np.array(h[name].value, dtype=np.float64) for h in (first, item.header))
            if np.abs(a - b).max() > tolerance:
                raise InputError(f"{item.path}: {name} is {b.tolist()}, but {a.tolist()} in {slices[0].path.name}; "
                                 "expected the same geometry for all slices, split the folder")  # fmt: skip
        if (item.header.Rows, item.header.Columns) != (first.Rows, first.Columns):
            raise InputError(
                f"{item.path}: {item.header.Rows} x {item.header.Columns} pixels, but {first.Rows} x {first.Columns} "
                f"in {slices[0].path.name}; expected the same size for all slices, split the folder"
            )
    if len(slices) < 2:
        raise InputError(f"{folder}: only one slice; expected at least two")
    along_row, along_column = np.array(first.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    if abs(np.linalg.norm(normal) - 1.0) > 1e-2:
        raise InputError(f"{folder}: ImageOrientationPatient {first.ImageOrientationPatient}: axes not orthogonal")
    slices = sorted(slices, key=lambda item: float(item.position @ normal))
    positions = np.stack([item.position for item in slices])
    slice_step = (positions[-1] - positions[0]) / (len(slices) - 1)
    _check_gaps(folder, slices, positions, normal)
    drift = np.abs(positions - positions[0] - np.arange(len(slices))[:, None] * slice_step).max()
    if drift > max(1.0, 0.5 * float(np.linalg.norm(slice_step))):
        raise InputError(
            f"{folder}: slice positions deviate {drift:.1f} mm from a straight line; expected one scan, split the folder"
        )
    # PixelSpacing is (between rows, between columns); the first three cosines point along a row.
    between_rows, between_columns = (float(v) for v in first.PixelSpacing)
    return slices, along_column * between_rows, along_row * between_columns, slice_step


def _native_bytes(slices: list[_Slice]) -> int | None:
    """Return the total file size in bytes, or None if any slice is compressed."""
    syntaxes = [getattr(item.header.file_meta, "TransferSyntaxUID", None) for item in slices]
    native = all(syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian) for syntax in syntaxes)
    return sum(item.path.stat().st_size for item in slices) if native else None


def _check_gaps(
    folder: Path, slices: list[_Slice], positions: NDArray[np.float64], normal: NDArray[np.float64]
) -> None:
    gaps = np.diff(positions @ normal)
    median_gap = float(np.median(gaps))
    uneven = np.flatnonzero(np.abs(gaps - median_gap) > _GAP_RELATIVE * median_gap + _GAP_MM)
    duplicates = np.flatnonzero(gaps <= _GAP_MM)
    if not len(uneven) and not len(duplicates):
        return
    at = int(duplicates[0]) if len(duplicates) else int(uneven[0])
    between = f"{slices[at].path.name} and {slices[at + 1].path.name}"
    if gaps[at] <= _GAP_MM:
        problem = f"{between} have the same position ({len(duplicates)} such pairs); remove duplicate slices or split the series"
    elif (
        median_gap > _GAP_MM
        and abs(gaps[at] / median_gap - round(gaps[at] / median_gap)) < 0.1
        and gaps[at] > 1.5 * median_gap
    ):
        missing = round(gaps[at] / median_gap) - 1
        problem = f"{missing} slice(s) missing between {between} (slice spacing is {median_gap:g} mm); restore them"
    else:
        problem = (
            f"uneven spacing: {gaps[at]:g} mm between {between}, {median_gap:g} mm elsewhere; split or resample it"
        )
    raise InputError(f"{folder}: {problem}")


def _pixels(folder: Path, slices: list[_Slice], shape: tuple[int, int, int]) -> NDArray[Any]:
    """Return the decoded voxels, (slice, row, column) in HU."""
    import SimpleITK as sitk

    scaling = [(float(s.header.get("RescaleSlope") or 1), float(s.header.get("RescaleIntercept") or 0)) for s in slices]
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(item.path) for item in slices])
    # ITK takes the pixel type from the first slice and would truncate fractional values of the others.
    if len(set(scaling)) > 1 or not all(value.is_integer() for value in scaling[0]):
        reader.SetOutputPixelType(sitk.sitkFloat32)
    # ITK warns about spacing; this is handled by `_check_gaps`, which has already rejected uneven series.
    warn = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise InputError(
            f"{folder}: cannot decode the pixels ({reason(error)}); the files are damaged, or GDCM does not "
            "support their transfer syntax: decompress them (for example gdcmconv --raw)"
        ) from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warn)
    voxels: NDArray[Any] = sitk.GetArrayFromImage(image)
    if voxels.shape != shape:
        raise InputError(
            f"{folder}: decoded shape is {voxels.shape}, but the headers declare {shape}; copy the series again"
        )
    _air_for_padding(voxels, slices, scaling)
    return voxels


def _air_for_padding(voxels: NDArray[Any], slices: list[_Slice], scaling: list[tuple[float, float]]) -> None:
    """Set padding pixels outside the field of view to air, in place."""
    for plane, item, (slope, intercept) in zip(voxels, slices, scaling, strict=True):
        stored = item.header.get("PixelPaddingValue")
        if not isinstance(stored, int):
            continue
        bits = int(item.header.get("BitsAllocated") or 16)
        if int(item.header.get("PixelRepresentation") or 0) == 1 and stored >= 1 << (bits - 1):
            stored -= 1 << bits  # stored as unsigned, meant as signed
        padding = slope * stored + intercept
        # A padding value in the tissue range is probably a header error; replacing it would cut holes into the patient.
        if not -1024 <= padding <= 3071:
            plane[plane == padding] = -1024
