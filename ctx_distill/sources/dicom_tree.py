"""Build a manifest of a DICOM folder tree: one row per study, with hashed ids and relative dates."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from datetime import date
from pathlib import Path

from ctx_distill.data.io.dicom import read_dicom_folder
from ctx_distill.data.io.write_nifti import write_nifti
from ctx_distill.errors import InputError
from ctx_distill.parallel import DIED, in_processes
from ctx_distill.sources.dicom_series import LOCALIZER, MIN_SLICES, Series, by_study, find_series
from ctx_distill.sources.options import SourceOptions
from ctx_distill.sources.pseudonyms import Pseudonyms, days_since
from ctx_distill.sources.rows import Built, ManifestRow, hashed_split, table
from ctx_distill.text.sections import cut_report, without_marks


def build(root: Path, options: SourceOptions, key: bytes | None) -> Built:
    """Return the rows of the studies under ROOT.

    Of a study's axial CT series with at least ten slices, the thinnest is selected (median distance between slices); ties
    go to more slices, then to the lower series number. Localizers, secondary captures, other modalities and other
    orientations are excluded and counted. `--reconstructions all` selects all these series.

    Ids become HMAC-SHA256 with `key`, and dates become `study_day`, the days since the patient's first study. If a path
    contains an id, name or date of the patient, the builder stops, unless `--convert FOLDER` writes the selected series as
    NIfTI with hashed names, or `--keep-paths` is set. Reports come from `--reports`, a CSV with `study` (StudyInstanceUID
    or AccessionNumber) and `report`, or `findings` and `impression`.

    Raises:
        InputError: no series, paths that identify patients, or an invalid report table.
    """
    series, skipped = find_series(root, options.workers)
    if not series:
        files = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no files"
        raise InputError(f"{root}: no DICOM series ({files}); expected a folder tree of DICOM files")
    names = Pseudonyms(key)
    built = Built("dicom", options.convert or root)
    for reason, count in skipped.items():
        built.left_out[reason] = count
    reports = _reports(options.reports)
    first_day = _first_days(series)
    scattered = {uid for uid, count in Counter(one.uid for one in series).items() if count > 1}
    chosen: list[tuple[ManifestRow, Series]] = []
    for study, several in by_study(series).items():
        usable = _usable(several, scattered, options.convert is not None, built)
        taken = usable if options.reconstructions == "all" else usable[:1]
        if len(usable) > len(taken):
            built.left_out["another series of the study was selected"] += len(usable) - len(taken)
        for one in taken:
            chosen.append((_row(one, study, names, options, reports, first_day.get(one.patient)), one))
    if not options.keep_ids and not options.keep_paths and options.convert is None:
        _reject_identifying_paths(root, [one for _, one in chosen])
    if options.convert is not None:
        chosen = _converted(root, options.convert, chosen, built, options.workers)
    built.rows = [row for row, _ in chosen]
    if reports is not None:
        with_report = sum(bool(row.findings or row.impression) for row in built.rows)
        built.notes.append(f"{with_report:,} of {len(built.rows):,} series have a report in {options.reports}")
    return built


def _usable(several: list[Series], scattered: set[str], convert: bool, built: Built) -> list[Series]:
    """Return the axial CT series of a study, the thinnest first; count the others as excluded."""
    usable = []
    for one in several:
        shares = not convert and any(
            other.folder == one.folder
            and len(other.along) >= len(one.along)
            and other is not one
            and other.reason != LOCALIZER
            for other in several
        )
        if one.reason:
            built.left_out[one.reason] += 1
        elif len(one.along) < MIN_SLICES:
            built.left_out[f"fewer than {MIN_SLICES} slices"] += 1
        elif one.uid in scattered:
            built.left_out["series in several folders"] += 1
        elif not one.patient or not one.study:
            built.left_out["no PatientID or StudyInstanceUID"] += 1
        elif shares:
            built.left_out["in the same folder as a larger series (use --convert)"] += 1
        else:
            usable.append(one)
    return sorted(usable, key=lambda one: (round(one.thickness, 2), -len(one.along), one.number, one.uid))


def _row(
    one: Series,
    study: str,
    names: Pseudonyms,
    options: SourceOptions,
    reports: dict[str, tuple[str, str]] | None,
    first: date | None,
) -> ManifestRow:
    patient, image = names.name("p", one.patient), names.name("i", one.uid)
    findings, impression = (reports or {}).get(study) or (reports or {}).get(one.accession) or ("", "")
    day = one.day.isoformat() if options.keep_ids and one.day else days_since(first, one.day)
    return ManifestRow(
        names.name("s", study), patient, hashed_split("dicom", patient, options.val, options.test), one.folder, image,
        findings, impression, more={"study_day": day, "slice_mm": round(one.thickness, 3)},
    )  # fmt: skip


def _first_days(found: list[Series]) -> dict[str, date]:
    days: dict[str, list[date]] = defaultdict(list)
    for one in found:
        if one.day is not None:
            days[one.patient].append(one.day)
    return {patient: min(dates) for patient, dates in days.items()}


def _reports(path: Path | None) -> dict[str, tuple[str, str]] | None:
    if path is None:
        return None
    read = table(path, "study")
    columns = read.columns
    if "report" in columns:
        texts = [cut_report(text) for text in columns["report"]]
    elif {"findings", "impression"} <= set(columns):
        texts = [
            (without_marks(a), without_marks(b))
            for a, b in zip(columns["findings"], columns["impression"], strict=True)
        ]
    else:
        raise InputError(f"{path}: expected column report, or findings and impression; found {', '.join(columns)}")
    return dict(zip((value.strip() for value in columns["study"]), texts, strict=True))


def _reject_identifying_paths(root: Path, chosen: list[Series]) -> None:
    identifying = sum(_identifies_patient(one) for one in chosen)
    if identifying:
        raise InputError(
            f"{root}: the paths of {identifying} of {len(chosen)} series contain an id, a name or a date of the patient, and"
            " would be written to the manifest; use --convert FOLDER to write the scans with hashed names, or --keep-paths"
        )


def _identifies_patient(one: Series) -> bool:
    """Return whether a path contains an id or date of its header, with any punctuation, or a part of the name."""
    words = {word for word in re.split(r"[^a-z0-9]+", str(one.folder).lower()) if word}
    parts = [re.sub(r"[^a-z0-9]+", "", part.lower()) for part in one.folder.parts]
    ids = {one.patient, one.study, one.uid, one.accession}
    if one.day is not None:
        ids |= {one.day.strftime(form) for form in ("%Y%m%d", "%d%m%Y", "%m%d%Y")}
    plain = {re.sub(r"[^a-z0-9]+", "", text.lower()) for text in ids} - {""}
    return bool(words & one.secrets) or any(text in part for text in plain for part in parts)


def _converted(
    root: Path, folder: Path, chosen: list[tuple[ManifestRow, Series]], built: Built, workers: int | None
) -> list[tuple[ManifestRow, Series]]:
    """Convert scans to NIfTI unless they exist, and return the rows of converted scans."""
    folder.mkdir(parents=True, exist_ok=True)
    items = [(root / one.folder, one.uid, folder / f"{row.image_id}.nii.gz") for row, one in chosen]
    faults = {item[2]: fault for item, fault in in_processes("converting", _convert, items, len(items), workers, _died)}
    kept = []
    for (row, one), (_, _, target) in zip(chosen, items, strict=True):
        if faults[target]:
            built.left_out["series that cannot be read"] += 1
            built.notes.append(faults[target])
        else:
            row.image = Path(target.name)
            kept.append((row, one))
    return kept


def _convert(item: tuple[Path, str, Path]) -> str:
    source, uid, target = item
    if target.exists():
        return ""
    try:
        voxels, affine = read_dicom_folder(source, uid)
        write_nifti(target, voxels, affine)
    except InputError as error:
        return str(error)
    return ""


def _died(item: tuple[Path, str, Path]) -> str:
    return f"{item[0]}: the process for this scan {DIED}"
