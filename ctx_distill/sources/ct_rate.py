"""Build a manifest of CT-RATE: volumes with reports, labels and metadata in CSV files.

Supports the first release and the `_fixed` release in HU (Hamamci et al., arXiv 2403.17834). Volumes are named
split_patient_study_reconstruction.
"""

from __future__ import annotations

import ast
import math
from collections import defaultdict
from pathlib import Path

from ctx_distill.data.manifests.tables import Table
from ctx_distill.errors import InputError
from ctx_distill.sources.options import SourceOptions
from ctx_distill.sources.rows import Built, ManifestRow, hashed_split, label_value, present, table
from ctx_distill.text.sections import without_marks

LABELS = (
    "Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion",
    "Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis", "Lung nodule",
    "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion", "Mosaic attenuation pattern",
    "Peribronchial thickening", "Consolidation", "Bronchiectasis", "Interlobular septal thickening",
)  # fmt: skip
"""Labels in the order of the data set's tables."""

UNREADABLE = frozenset({"train_1267_a_4", "train_11755_a_3", "train_11755_a_4"})
"""Volumes that HLIP's authors list as invalid in their loader."""

VAL_SHARE = 0.05
_LONG = {"train": "train", "valid": "validation"}


def build(root: Path, options: SourceOptions) -> Built:
    """Return the rows of a complete or partial download.

    ROOT, or its folder `dataset`, contains `train*`/`valid*` and the tables. A hash of the id assigns 5 % of the `train`
    patients to val; `valid`, on which published results are reported, is test. Of the existing reconstructions of a study,
    the thinnest (ZSpacing) is selected, then the one with most slices, then the lowest number; `--reconstructions all`
    selects all.

    Raises:
        InputError: the layout or a table is not that of CT-RATE.
    """
    base = root / "dataset" if (root / "dataset").is_dir() else root
    release = options.release or ("fixed" if any((base / f"{name}_fixed").is_dir() for name in _LONG) else "first")
    built = Built("ct-rate", base)
    for name, long in _LONG.items():
        folder = base / (f"{name}_fixed" if release == "fixed" else name)
        if not folder.is_dir():
            built.notes.append(f"{folder.name} does not exist; its volumes are not in the manifest")
            continue
        _add_split(built, name, long, folder, release, options)
    if not built.rows and not built.left_out:
        raise InputError(
            f"{base}: no folder train, valid, train_fixed or valid_fixed; expected the `dataset` folder of CT-RATE"
        )
    return built


def _add_split(built: Built, name: str, long: str, folder: Path, release: str, options: SourceOptions) -> None:
    base = built.root
    reports = table(
        base / "radiology_text_reports" / f"{long}_reports.csv", "VolumeName", "Findings_EN", "Impressions_EN"
    )
    label_table = base / "multi_abnormality_labels" / f"{name}_predicted_labels.csv"
    labels = _by_volume(label_table, *LABELS)
    metadata = _by_volume(
        base / "metadata" / f"{long}_metadata.csv",
        "XYSpacing", "ZSpacing", "RescaleSlope", "RescaleIntercept", "NumberofSlices",
        required=release == "first",
    )  # fmt: skip
    no_chest = base / "metadata" / f"no_chest_{name}.txt"
    outside = set(no_chest.read_text().split()) if no_chest.is_file() else set()
    studies: dict[str, list[tuple[ManifestRow, dict[str, str]]]] = defaultdict(list)
    for place, volume in enumerate(reports.columns["VolumeName"]):
        image_id = volume.removesuffix(".nii.gz")
        patient, study = image_id.rsplit("_", 2)[0], image_id.rsplit("_", 1)[0]
        facts = metadata.get(volume, {})
        row = ManifestRow(
            study, patient, "test" if name == "valid" else hashed_split("ct-rate", patient, VAL_SHARE),
            folder.relative_to(base) / patient / study / volume, image_id,
            findings=without_marks(reports.columns["Findings_EN"][place]),
            impression=without_marks(reports.columns["Impressions_EN"][place]),
            labels=_labels(label_table, labels.get(volume, {})),
        )  # fmt: skip
        if image_id in UNREADABLE:
            built.left_out["known to be unreadable"] += 1
        elif {volume, image_id, study, patient} & outside:
            built.left_out[f"no chest (listed in {no_chest.name})"] += 1
        elif not present(built, [row]):
            pass
        elif release == "first" and not _raw_facts(facts):
            built.left_out["no slope, intercept and spacing in the metadata"] += 1
        else:
            row.more = _raw_facts(facts) if release == "first" else {}
            studies[study].append((row, facts))
    for several in studies.values():
        several.sort(key=lambda item: _thinnest_first(*item))
        selected = several if options.reconstructions == "all" else several[:1]
        built.rows += [row for row, _ in selected]
        if len(several) > len(selected):
            built.left_out["another reconstruction of the study was selected"] += len(several) - len(selected)


def _by_volume(path: Path, *columns: str, required: bool = False) -> dict[str, dict[str, str]]:
    if not path.is_file() and not required:
        return {}
    read: Table = table(path, "VolumeName", *columns)
    rows = zip(*(read.columns[name] for name in columns), strict=True)
    return {
        volume: dict(zip(columns, row, strict=True))
        for volume, row in zip(read.columns["VolumeName"], rows, strict=True)
    }


def _labels(path: Path, row: dict[str, str]) -> dict[str, float | None]:
    return {name.lower(): label_value(path, name, row[name]) for name in LABELS} if row else {}


def _thinnest_first(row: ManifestRow, facts: dict[str, str]) -> tuple[float, float, int]:
    number = row.image_id.rsplit("_", 1)[1]
    thickness, slices = _number(facts.get("ZSpacing", "")), _number(facts.get("NumberofSlices", ""))
    return (
        thickness if thickness is not None else math.inf,
        -(slices or 0.0),
        int(number) if number.isdecimal() else 0,
    )


def _raw_facts(row: dict[str, str]) -> dict[str, float]:
    """Return slope, intercept and spacing of raw values; empty if one of them is missing."""
    try:
        plane = ast.literal_eval(row.get("XYSpacing", ""))
        x, y = float(plane[0]), float(plane[1])
    except (ValueError, SyntaxError, TypeError, IndexError):
        return {}
    named = {"slope": "RescaleSlope", "intercept": "RescaleIntercept", "spacing_z": "ZSpacing"}
    values = {name: _number(row.get(column, "")) for name, column in named.items()}
    numbers = {name: value for name, value in values.items() if value is not None}
    return {"spacing_x": x, "spacing_y": y, **numbers} if len(numbers) == len(named) else {}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
