"""Find the CT series of each study in a folder tree from the headers of all files."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from ctx_distill.data.io.dicom import CT_STORAGE
from ctx_distill.parallel import in_processes

ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
LOCALIZER = "localizer"
MIN_SLICES = 10
# Slices with a gantry tilt of up to 30 degrees still count as axial.
_AXIAL = 0.8

_TAGS = [
    "SOPClassUID", "Modality", "PatientID", "PatientName", "PatientBirthDate", "StudyInstanceUID", "AccessionNumber",
    "StudyDate", "SeriesInstanceUID", "SeriesNumber", "ImageType", "ImagePositionPatient", "ImageOrientationPatient",
    "SliceThickness", "Rows",
]  # fmt: skip


@dataclass
class Series:
    """The slices of one series in one folder.

    Attributes:
        folder: path relative to the root.
        patient: PatientID.
        secrets: other identifying words of the header: parts of the name, the birth date.
        study: StudyInstanceUID.
        accession: AccessionNumber.
        day: StudyDate.
        uid: SeriesInstanceUID.
        number: SeriesNumber; 0 if missing.
        reason: why it is not an axial CT; "" if it is one.
        along: positions of the slices along their normal, mm.
    """

    folder: Path
    patient: str
    secrets: frozenset[str]
    study: str
    accession: str
    day: date | None
    uid: str
    number: int
    reason: str = ""
    along: list[float] = field(default_factory=list)

    @property
    def thickness(self) -> float:
        """The median distance between slices in mm; infinite for a single slice."""
        gaps = np.diff(np.unique(np.round(self.along, 3)))
        return float(np.median(gaps)) if len(gaps) else float("inf")


def find_series(root: Path, workers: int | None) -> tuple[list[Series], Counter[str]]:
    """Return all series under a folder, without following links, and the number of skipped files by reason."""
    folders = [folder for folder, _, files in _walk(root) if files]
    all_series: list[Series] = []
    skipped: Counter[str] = Counter()
    items = [(root, folder) for folder in folders]
    for _, (series, reasons) in in_processes("reading headers", _series_of_folder, items, len(items), workers):
        all_series += series
        skipped += reasons
    return sorted(all_series, key=lambda s: (s.study, s.number, s.uid, str(s.folder))), skipped


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    for folder, folders, files in os.walk(root, followlinks=False):
        folders.sort()
        yield Path(folder), folders, [name for name in files if name.upper() != "DICOMDIR"]


def _series_of_folder(item: tuple[Path, Path]) -> tuple[list[Series], Counter[str]]:
    root, folder = item
    series_by_uid: dict[str, Series] = {}
    skipped: Counter[str] = Counter()
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            skipped["symbolic link (not followed)"] += 1
            continue
        if not path.is_file() or path.name.upper() == "DICOMDIR":
            continue
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
        except Exception:  # pydicom raises a dozen exception types on other files
            skipped["file that is not DICOM"] += 1
            continue
        try:
            reason = _add(series_by_uid, header, folder.relative_to(root))
        except Exception:  # likewise when a value is parsed
            reason = "DICOM file with a damaged header"
        if reason:
            skipped[reason] += 1
    for series in series_by_uid.values():
        # the reader skips localizers in an axial series too
        if not series.along and not series.reason:
            series.reason = LOCALIZER
    return list(series_by_uid.values()), skipped


def _add(series_by_uid: dict[str, Series], header: Any, folder: Path) -> str:
    """Add one file to its series; return the reason if it is skipped, else ""."""
    uid = str(header.get("SeriesInstanceUID") or "")
    if not uid or header.get("Rows") is None:
        return "DICOM file without an image"
    fault, along = _fault(header), _along(header)
    series = series_by_uid[uid] if uid in series_by_uid else _new(header, uid, folder)
    series_by_uid[uid] = series
    if fault == LOCALIZER:
        return ""
    series.reason = series.reason or fault
    if along is not None:
        series.along.append(along)
    return ""


def _new(header: Any, uid: str, folder: Path) -> Series:
    text = {name: str(header.get(name) or "").strip() for name in _TAGS[:9]}
    words = [word for word in text["PatientName"].replace("^", " ").split() if len(word) > 2]
    return Series(
        folder, text["PatientID"], frozenset(word.lower() for word in (*words, text["PatientBirthDate"]) if word),
        text["StudyInstanceUID"], text["AccessionNumber"], _date(text["StudyDate"]), uid,
        int(header.get("SeriesNumber") or 0),
    )  # fmt: skip


def _date(text: str) -> date | None:
    try:
        return datetime.strptime(text, "%Y%m%d").date()
    except ValueError:
        return None


def _fault(header: Any) -> str:
    """Return why a file's series is not an axial CT, or "" if it may be one."""
    kinds = [str(kind).upper() for kind in header.get("ImageType") or []]
    sop = str(header.get("SOPClassUID") or "")
    # Many archives mark reformatted axial slices as DERIVED\SECONDARY, so this is not a criterion.
    if sop.startswith(SECONDARY_CAPTURE) or "SCREEN SAVE" in kinds:
        return "secondary capture"
    if "LOCALIZER" in kinds or "SCOUT" in kinds:
        return LOCALIZER
    if sop == ENHANCED_CT:
        return "enhanced multi-frame (convert it to one slice per file)"
    if str(header.get("Modality") or "") != "CT" or (sop and sop != CT_STORAGE):
        return "not a CT"
    normal = _normal(header)
    if normal is None:
        return "slices without position or orientation"
    return "" if abs(normal[2]) >= _AXIAL else "not axial"


def _normal(header: Any) -> Any:
    try:
        cosines = np.array([float(v) for v in header.ImageOrientationPatient]).reshape(2, 3)
        [float(v) for v in header.ImagePositionPatient]
    except (AttributeError, TypeError, ValueError):
        return None
    return np.cross(cosines[0], cosines[1])


def _along(header: Any) -> float | None:
    normal = _normal(header)
    return None if normal is None else float(np.array([float(v) for v in header.ImagePositionPatient]) @ normal)


def by_study(series: list[Series]) -> dict[str, list[Series]]:
    """Return the series of each study, in order."""
    studies: dict[str, list[Series]] = defaultdict(list)
    for one in series:
        studies[one.study].append(one)
    return dict(studies)
