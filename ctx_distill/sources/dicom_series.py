"""What a hospital's folder tree holds: the CT series of each study, out of every file's header."""

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
# A head tilted by a gantry of up to 30 degrees is still axial: the normal's largest part is along the patient.
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
        folder: under the root.
        patient: PatientID.
        secrets: other words of the header that name the patient: parts of the name, the birth date.
        study: StudyInstanceUID.
        accession: AccessionNumber.
        day: StudyDate.
        uid: SeriesInstanceUID.
        number: SeriesNumber; 0 where there is none.
        reason: why it is no axial CT; "" where it is one.
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
        """Median distance between slices in mm; infinite for a single one."""
        gaps = np.diff(np.unique(np.round(self.along, 3)))
        return float(np.median(gaps)) if len(gaps) else float("inf")


def find_series(root: Path, workers: int | None) -> tuple[list[Series], Counter[str]]:
    """All series under a folder, links not followed, and how many files were passed over by reason."""
    folders = [folder for folder, _, files in _walk(root) if files]
    found: list[Series] = []
    passed: Counter[str] = Counter()
    items = [(root, folder) for folder in folders]
    for _, (series, reasons) in in_processes("reading headers", _series_of_folder, items, len(items), workers):
        found += series
        passed += reasons
    return sorted(found, key=lambda s: (s.study, s.number, s.uid, str(s.folder))), passed


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    for folder, folders, files in os.walk(root, followlinks=False):
        folders.sort()
        yield Path(folder), folders, [name for name in files if name.upper() != "DICOMDIR"]


def _series_of_folder(item: tuple[Path, Path]) -> tuple[list[Series], Counter[str]]:
    root, folder = item
    found: dict[str, Series] = {}
    passed: Counter[str] = Counter()
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            passed["symbolic link, which is not followed"] += 1
            continue
        if not path.is_file() or path.name.upper() == "DICOMDIR":
            continue
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
        except Exception:  # pydicom ends in any of a dozen types on files of other kinds
            passed["file that is not DICOM"] += 1
            continue
        try:
            reason = _add(found, header, folder.relative_to(root))
        except Exception:  # likewise where a value is asked for
            reason = "DICOM file with a damaged header"
        if reason:
            passed[reason] += 1
    for series in found.values():
        # a localizer inside an axial series is passed over by the reader too
        if not series.along and not series.reason:
            series.reason = LOCALIZER
    return list(found.values()), passed


def _add(found: dict[str, Series], header: Any, folder: Path) -> str:
    """Count one file to its series; why it is passed over, where it has none."""
    uid = str(header.get("SeriesInstanceUID") or "")
    if not uid or header.get("Rows") is None:
        return "DICOM file without an image"
    fault, along = _fault(header), _along(header)
    series = found[uid] if uid in found else _new(header, uid, folder)
    found[uid] = series
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
    """Why a file's series is no axial CT; "" where it may be one."""
    kinds = [str(kind).upper() for kind in header.get("ImageType") or []]
    sop = str(header.get("SOPClassUID") or "")
    # DERIVED\SECONDARY is also what many archives call reformatted axial slices, so that word alone says nothing.
    if sop.startswith(SECONDARY_CAPTURE) or "SCREEN SAVE" in kinds:
        return "secondary capture"
    if "LOCALIZER" in kinds or "SCOUT" in kinds:
        return LOCALIZER
    if sop == ENHANCED_CT:
        return "enhanced multi-frame (convert it to one slice a file)"
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
    """Series of each study, in order."""
    studies: dict[str, list[Series]] = defaultdict(list)
    for one in series:
        studies[one.study].append(one)
    return dict(studies)
