"""Build a manifest of PadChest (Bustos et al. 2020).

PadChest has 16-bit films, stemmed Spanish reports without stop words, and labels by physicians and a network. The PNGs
store detector values, so low values of films that were MONOCHROME1 in DICOM are white.
"""

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
"""Map from CheXpert's findings to PadChest's terms."""


def build(root: Path, options: SourceOptions) -> Built:
    """Return the rows of all existing films, split by a hash of the patient id (`--val`, `--test`).

    Without column StudyID, a study consists of a patient's films of one StudyDate_DICOM. Without
    PhotometricInterpretation_DICOM, films are assumed not to be inverted, which is noted in the summary.

    The reports are Spanish (`language` es), so the index needs a multilingual text tower. `--english-from-labels` writes
    English sentences generated from the labels instead (ours, not by a radiologist).

    Raises:
        InputError: the table is missing or is not that of PadChest.
    """
    built = Built("padchest", root)
    names = ("ImageID", "ImageDir", "PatientID", "Projection", "Labels", "Report")
    columns = table(root / TABLE, *names).columns
    studies = _studies(root / TABLE, columns)
    photometric = columns.get("PhotometricInterpretation_DICOM")
    if photometric is None:
        built.notes.append(
            "no column PhotometricInterpretation_DICOM: films of MONOCHROME1 are not recognised and not inverted"
        )
    for place, image_id in enumerate(columns["ImageID"]):
        value = {name: columns[name][place].strip() for name in names}
        terms = _terms(value["Labels"])
        path = next((p for p in (Path(value["ImageDir"]) / image_id, Path(image_id)) if (root / p).is_file()), None)
        if path is None:
            built.left_out["image file does not exist"] += 1
        elif "exclude" in terms:
            built.left_out["labelled exclude by the data set"] += 1
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
        built.notes.append("findings are English sentences generated from the labels by ctx-distill, not reports")
    return built


def _studies(path: Path, columns: Mapping[str, list[str]]) -> list[str]:
    """Return the study of each film: StudyID, or else the patient and a number per study date."""
    if "StudyID" in columns:
        return [value.strip() for value in columns["StudyID"]]
    if "StudyDate_DICOM" not in columns:
        raise InputError(
            f"{path}: neither column StudyID nor StudyDate_DICOM; check that it is the table of this data set"
        )
    days: dict[str, dict[str, int]] = {}
    studies = []
    for patient, day in zip(columns["PatientID"], columns["StudyDate_DICOM"], strict=True):
        seen = days.setdefault(patient.strip(), {})
        studies.append(f"{patient.strip()}_{seen.setdefault(day.strip(), len(seen) + 1)}")
    return studies


def _terms(text: str) -> list[str]:
    """Parse a Python list literal; return an empty list if it is invalid."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [str(term).strip().lower() for term in value] if isinstance(value, (list, tuple)) else []


def english_from_labels(terms: Sequence[str]) -> str:
    """Return one sentence per term, or a sentence for a normal study.

    Args:
        terms: PadChest's labels of one film.
    """
    findings = [term for term in dict.fromkeys(terms) if term not in _NO_FINDINGS]
    if not findings:
        return "No acute cardiopulmonary finding." if "normal" in terms else ""
    return " ".join(f"{term[0].upper()}{term[1:]}." for term in findings)
