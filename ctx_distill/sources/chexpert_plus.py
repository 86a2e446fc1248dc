"""Build a manifest of CheXpert Plus (Chambon et al., arXiv 2405.19538): CheXpert's films with reports in one table."""

from __future__ import annotations

from pathlib import Path

from ctx_distill.errors import InputError
from ctx_distill.sources.options import SourceOptions
from ctx_distill.sources.rows import Built, ManifestRow, hashed_split, one_split_per_patient, table
from ctx_distill.text.sections import cut_report, without_marks

TABLE = "df_chexpert_plus_240401.csv"
VAL_SHARE = 0.05
_COLUMNS = ("path_to_image", "path_to_dcm", "frontal_lateral", "ap_pa", "deid_patient_id", "report")
_SECTIONS = ("section_findings", "section_impression")


def build(root: Path, options: SourceOptions) -> Built:
    """Return the rows of all existing films: the JPEG or PNG of `path_to_image`, or else the DICOM of `path_to_dcm`.

    The published `valid` split is test; a hash assigns 5 % of the `train` patients to val. Findings and impression are the
    section columns if not empty, or else cut from the report.

    Raises:
        InputError: the table is missing or is not that of CheXpert Plus.
    """
    built = Built("chexpert-plus", root)
    read = table(root / TABLE, *_COLUMNS, *_SECTIONS, "split")
    columns = read.columns
    for place, image in enumerate(columns["path_to_image"]):
        path = _on_disk(root, image, columns["path_to_dcm"][place])
        if path is None:
            built.left_out["image file does not exist"] += 1
            continue
        patient = columns["deid_patient_id"][place]
        # .../patient00001/study1/view1_frontal.jpg: study numbers are unique only within a patient.
        parts = Path(image).parts
        if len(parts) < 3:
            raise InputError(
                f"{root / TABLE}: row {read.rows[place]}: path_to_image {image!r}; expected .../study1/view1.jpg"
            )
        study = f"{patient}_{parts[-2]}"
        findings, impression = (without_marks(columns[name][place]) for name in _SECTIONS)
        if not (findings and impression):
            cut_findings, cut_impression = cut_report(columns["report"][place])
            findings, impression = findings or cut_findings, impression or cut_impression
        published_split = columns["split"][place].strip().lower()
        split = (
            "test" if published_split in ("valid", "val", "test") else hashed_split("chexpert-plus", patient, VAL_SHARE)
        )
        image_id = f"{study}_{Path(image).stem}"
        view = _view(columns["frontal_lateral"][place], columns["ap_pa"][place])
        built.rows.append(ManifestRow(study, patient, split, path, image_id, findings, impression, view))
    one_split_per_patient(built)
    return built


def _view(side: str, direction: str) -> str:
    if side.strip().lower() == "lateral":
        return "lateral"
    return direction.strip().upper() if direction.strip().upper() in ("PA", "AP") else "frontal"


def _on_disk(root: Path, image: str, dicom: str) -> Path | None:
    pictures = [Path(image), Path(image).with_suffix(".png")]
    tries = [folder / picture for picture in pictures for folder in (Path(), Path("PNG"), Path("CheXpert-v1.0"))]
    tries += [folder / dicom for folder in (Path(), Path("DICOM")) if dicom.strip()]
    return next((path for path in tries if (root / path).is_file()), None)
