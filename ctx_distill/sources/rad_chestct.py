"""Build a manifest of Rad-ChestCT (Draelos et al. 2021): npz volumes of 0.8 mm with labels, without reports."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ctx_distill.errors import InputError
from ctx_distill.sources.options import SourceOptions
from ctx_distill.sources.rows import Built, ManifestRow, label_value, present, table

_TABLES = {"train": ("trn", "imgtrain"), "val": ("val", "imgvalid"), "test": ("tst", "imgtest")}
ID = "NoteAcc_DEID"

_SHARED: Mapping[str, tuple[str, ...]] = {
    "arterial wall calcification": ("calcification",),
    "cardiomegaly": ("cardiomegaly",),
    "pericardial effusion": ("pericardial_effusion",),
    "coronary artery wall calcification": ("calcification",),
    "hiatal hernia": ("hernia",),
    "emphysema": ("emphysema",),
    "atelectasis": ("atelectasis",),
    "lung opacity": ("opacity",),
    "pleural effusion": ("pleural_effusion",),
    "peribronchial thickening": ("bronchial_wall_thickening",),
    "consolidation": ("consolidation",),
    "bronchiectasis": ("bronchiectasis",),
    "interlobular septal thickening": ("septal_thickening",),
}
MAPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "hlip": {**_SHARED, "lung nodule": ("nodule",), "pulmonary fibrotic sequela": ("fibrosis",)},
    "radfinder": {
        **_SHARED,
        "medical material": (
            "catheter_or_port", "tracheal_tube", "chest_tube", "breast_implant", "pacemaker_or_defib", "stent", "clip",
            "staple", "gi_tube", "hardware", "suture",
        ),
        "lymphadenopathy": ("lymphadenopathy",),
        "lung nodule": ("nodule", "nodulegr1cm"),
        "pulmonary fibrotic sequela": ("scarring",),
    },
}  # fmt: skip
"""Maps from Rad-ChestCT's to CT-RATE's labels in the code of two papers: HLIP (15 labels) and RadFinder (17).

A label is present if one of its abnormalities is present at any location.
"""


def build(root: Path, options: SourceOptions) -> Built:
    """Return the rows of the existing volumes in ROOT or ROOT/npz, with the published split.

    `--labels hlip` or `radfinder` maps to CT-RATE's labels as in that paper; `own` keeps the published abnormalities. The
    data set has no patient ids but is split by patient, so each volume counts as a separate patient.

    Raises:
        InputError: an unknown map, or no label table.
    """
    if options.labels not in (*MAPS, "own"):
        raise InputError(f"unknown --labels {options.labels}; choose from: {', '.join(MAPS)}, own")
    built = Built("rad-chestct", root)
    folder = Path("npz") if (root / "npz").is_dir() else Path()
    any_table = False
    for split, (prefix, name) in _TABLES.items():
        path = root / f"{name}_Abnormality_and_Location_Labels.csv"
        if not path.is_file():
            built.notes.append(f"{path.name} does not exist; its volumes are not in the manifest")
            continue
        any_table = True
        read = table(path)
        id_column = ID if ID in read.columns else next(iter(read.columns))
        labels, left_blank = _labels(read.columns, options.labels, path)
        if left_blank:
            built.notes.append(
                f"{path.name} lacks abnormalities of map {options.labels}; without label: {', '.join(left_blank)}"
            )
        for place, cell in enumerate(read.columns[id_column]):
            image_id = cell.strip().removesuffix(".npz")
            if not image_id.startswith(prefix):
                raise InputError(
                    f"{path}: row {read.rows[place]}: {id_column} {image_id!r}; expected {prefix} and a number"
                )
            row = ManifestRow(image_id, image_id, split, folder / f"{image_id}.npz", image_id)
            row.labels = {finding: float(values[place]) for finding, values in labels.items()}
            built.rows += present(built, [row])
    if not any_table:
        raise InputError(
            f"{root}: expected at least one of {', '.join(f'{n}_Abnormality_and_Location_Labels.csv' for _, n in _TABLES.values())}"
        )
    built.notes.append("this data set has no reports; use it for evaluation and stage 4, not for stages 1 to 3")
    return built


def _labels(columns: Mapping[str, list[str]], name: str, path: Path) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    """Return labels (N,) of 0 and 1 by finding, and the findings whose abnormalities are not all in the table."""
    of: dict[str, list[str]] = defaultdict(list)
    for column in columns:
        abnormality, star, _ = column.partition("*")
        if star:
            of[abnormality.strip()].append(column)
    wanted = MAPS[name] if name in MAPS else {key.replace("_", " "): (key,) for key in of}
    if not of:
        raise InputError(f"{path}: no column abnormality*location; check that it is a table of this data set")
    lacking = [finding for finding, keys in wanted.items() if not set(keys) <= set(of)]
    wanted = {finding: keys for finding, keys in wanted.items() if finding not in lacking}
    present_at = {
        key: np.any(
            [[(label_value(path, column, value) or 0) > 0 for value in columns[column]] for column in of[key]], axis=0
        )
        for key in {key for keys in wanted.values() for key in keys}
    }
    labels = {
        finding: np.any([present_at[key] for key in keys], axis=0).astype(np.int64) for finding, keys in wanted.items()
    }
    return labels, lacking
