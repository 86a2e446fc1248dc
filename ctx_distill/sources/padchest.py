"""PadChest (Bustos et al. 2020): 16-bit films, Spanish reports without stop words and endings, labels by physicians and a
network. The PNGs hold the detector's values: films that DICOM called MONOCHROME1 are stored with white low."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path

from ctx_distill.errors import InputError
from ctx_distill.sources.options import SourceOptions
from ctx_distill.sources.rows import Built, ManifestRow, hashed_split, table
from ctx_distill.text.sections import without_marks

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
_VIEWS = {"PA": "PA", "AP": "AP", "AP_HORIZONTAL": "AP", "L": "lateral"}
_NO_FINDINGS = frozenset({"normal", "unchanged", "exclude", "suboptimal study", ""})
_SHARED: Mapping[str, tuple[str, ...]] = {
    "cardiomegaly": ("cardiomegaly",),
    "edema": ("pulmonary edema",),
    "consolidation": ("consolidation",),
    "pneumonia": ("pneumonia", "atypical pneumonia"),
    "atelectasis": ("atelectasis", "lobar atelectasis", "laminar atelectasis", "segmental atelectasis", "total atelectasis"),
    "pneumothorax": ("pneumothorax", "hydropneumothorax"),
    "pleural effusion": ("pleural effusion", "loculated pleural effusion", "hydropneumothorax"),
    "fracture": ("fracture", "vertebral fracture", "clavicle fracture", "humeral fracture", "rib fracture", "callus rib fracture"),
}  # fmt: skip
"""CheXpert's findings out of PadChest's terms."""


def build(root: Path, options: SourceOptions) -> Built:
    """Rows of every film on the disk, split by a hash of the patient's id (`--val`, `--test`).

    Without a column StudyID a study is a patient's films of one StudyDate_DICOM; without PhotometricInterpretation_DICOM the films
    are taken as bright where the film is bright, and the counts say so.

    The reports are Spanish (`language` es), so the index takes them with a multilingual tower alone;
    `--english-from-labels` writes English sentences made from the labels instead. Those are ours, not a radiologist's.

    Raises:
        InputError: the table is missing or not the set's.
    """
    built = Built("padchest", root)
    names = ("ImageID", "ImageDir", "PatientID", "Projection", "Labels", "Report")
    columns = table(root / TABLE, *names).columns
    studies = _studies(root / TABLE, columns)
    photometric = columns.get("PhotometricInterpretation_DICOM")
    if photometric is None:
        built.notes.append(
            "no column PhotometricInterpretation_DICOM: films of MONOCHROME1 are not told, and not turned"
        )
    for place, image_id in enumerate(columns["ImageID"]):
        value = {name: columns[name][place].strip() for name in names}
        terms = _terms(value["Labels"])
        path = next((p for p in (Path(value["ImageDir"]) / image_id, Path(image_id)) if (root / p).is_file()), None)
        if path is None:
            built.left_out["image is not on the disk"] += 1
        elif "exclude" in terms:
            built.left_out["labelled exclude by the set"] += 1
        elif not value["PatientID"] or not studies[place]:
            built.left_out["no patient or study id"] += 1
        else:
            english = english_from_labels(terms) if options.english_from_labels else None
            inverted = photometric is not None and photometric[place].strip() == "MONOCHROME1"
            built.rows.append(
                ManifestRow(
                    studies[place], value["PatientID"],
                    hashed_split("padchest", value["PatientID"], options.val, options.test), path, image_id,
                    findings=without_marks(value["Report"]) if english is None else english,
                    view=_VIEWS.get(value["Projection"].upper(), "other"),
                    language="es" if english is None else "en",
                    labels={name: float(bool(set(keys) & set(terms))) for name, keys in _SHARED.items()},
                    more={"polarity": "inverted" if inverted else ""},
                )
            )  # fmt: skip
    if options.english_from_labels:
        built.notes.append("findings are English sentences made from the labels by ctx-distill, not reports")
    return built


def _studies(path: Path, columns: Mapping[str, list[str]]) -> list[str]:
    """Each film's study: StudyID, else the patient and the number of the day among the patient's in the table's order."""
    if "StudyID" in columns:
        return [value.strip() for value in columns["StudyID"]]
    if "StudyDate_DICOM" not in columns:
        raise InputError(f"{path}: neither column StudyID nor StudyDate_DICOM; is it this data set's table?")
    days: dict[str, dict[str, int]] = {}
    studies = []
    for patient, day in zip(columns["PatientID"], columns["StudyDate_DICOM"], strict=True):
        seen = days.setdefault(patient.strip(), {})
        studies.append(f"{patient.strip()}_{seen.setdefault(day.strip(), len(seen) + 1)}")
    return studies


def _terms(text: str) -> list[str]:
    """A list as Python prints it, evaluated as a literal alone; damaged ones are no terms."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [str(term).strip().lower() for term in found] if isinstance(found, (list, tuple)) else []


def english_from_labels(terms: Sequence[str]) -> str:
    """One sentence a term; a study without findings says so.

    Args:
        terms: PadChest's labels of one film.
    """
    told = [term for term in dict.fromkeys(terms) if term not in _NO_FINDINGS]
    if not told:
        return "No acute cardiopulmonary finding." if "normal" in terms else ""
    return " ".join(f"{term[0].upper()}{term[1:]}." for term in told)
