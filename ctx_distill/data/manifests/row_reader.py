"""Read a manifest row by row as Python strings, and report the row and column of every problem.

`column_reader` reads the same files by column and falls back to this module to report problems.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ctx_distill.data.manifests.column_reader import LABEL, LABEL_VALUES, NUMBERS, OPTIONAL, PLACES, REQUIRED, SPLITS
from ctx_distill.data.manifests.image_paths import faults_by_place, path_fault
from ctx_distill.data.manifests.problems import Problems, shorten
from ctx_distill.data.manifests.tables import Table, read_table
from ctx_distill.errors import InputError


def read_by_rows(path: Path, check_images: bool) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Read and check a manifest.

    Args:
        path: a .csv (UTF-8) or .parquet file.
        check_images: also open every image.

    Returns:
        The rows (see `Manifest.frame`) and the findings of the label columns.

    Raises:
        InputError: violations of the schema; one message lists up to ten and their total.
    """
    table = read_table(path)
    _check_columns(table)
    if not table.rows:
        raise InputError(f"{path}: a header but no rows; expected one row per image")
    frame, finding_names = _normalise(table)
    _check_rows(table, frame)
    if check_images:
        _check_files(table, frame)
    return frame, finding_names


def _check_columns(table: Table) -> None:
    names = list(table.columns)
    missing = [name for name in REQUIRED if name not in names]
    if not missing:
        return
    hint = "add them (a blank findings or impression is fine)"
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        hint = "the columns seem to use another separator; separate them by commas"
    raise InputError(
        f"{table.path}: row 1: missing column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
        f"found {shorten(', '.join(names), 200)}; {hint}"
    )


def _normalise(table: Table) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Return the columns of the schema with stripped text and numeric labels, and the finding names."""
    problems = Problems(table.path)
    data: dict[str, object] = {}
    for name in (*REQUIRED, *OPTIONAL):
        values = table.columns.get(name, [""] * len(table.rows))
        # Stripped, because "p1 " and "p1" would be two patients, one of whom could be in train and the other in test.
        data[name] = pd.array([value.strip() for value in values], dtype="object")
    if "image_id" not in table.columns:
        data["image_id"] = data["study_id"]
    data["study_code"] = pd.factorize(pd.Series(data["study_id"]))[0].astype(np.int64)
    for name in PLACES:
        if name in table.columns:
            data[name] = pd.array([value.strip() for value in table.columns[name]], dtype="object")
    for name in NUMBERS:
        if name in table.columns:
            data[name] = _numbers_of(table, name, problems)
    finding_names: list[str] = []
    for name, values in table.columns.items():
        if not name.startswith(LABEL):
            continue
        finding = name.removeprefix(LABEL).strip()
        if not finding or finding in finding_names:
            raise InputError(
                f"{table.path}: row 1, column {name!r}: found {'a second' if finding else 'no'} finding name; "
                "expected label:<finding>, each finding once"
            )
        finding_names.append(finding)
        numbers = np.full(len(values), np.nan, dtype=np.float64)
        for i, value in enumerate(values):
            number = LABEL_VALUES.get(value.strip())
            if number is None:
                problems.add(
                    table.rows[i], name, shorten(value), "expected 1 (present), 0 (absent), -1 (uncertain) or blank"
                )
            else:
                numbers[i] = number
        data[LABEL + finding] = numbers
    problems.raise_if_any()
    return pd.DataFrame(data), tuple(finding_names)


def _check_files(table: Table, frame: pd.DataFrame) -> None:
    problems = Problems(table.path)
    roots = frame["root"].tolist() if "root" in frame.columns else [""] * len(frame)
    faults, no_folders = faults_by_place(table.path.parent, roots, frame["image_path"].tolist())
    for place, root in no_folders.items():
        found = f"{root!r}, which is not a folder"
        problems.add(table.rows[place], "root", found, "expected the folder that image_path is relative to")
    for place, fault in sorted(faults.items()):
        problems.add(table.rows[place], "image_path", *fault)
    problems.raise_if_any()


def _numbers_of(table: Table, name: str, problems: Problems) -> NDArray[np.float64]:
    """Return a column of `NUMBERS`; reports spacings that are not positive and slopes of 0."""
    numbers = np.full(len(table.rows), np.nan)
    for i, value in enumerate(table.columns[name]):
        if not value.strip():
            continue
        try:
            numbers[i] = float(value)
        except ValueError:
            numbers[i] = np.inf
        invalid = not np.isfinite(numbers[i]) or (name.startswith("spacing") and numbers[i] <= 0)
        if invalid or (name == "slope" and numbers[i] == 0):
            problems.add(
                table.rows[i], name, shorten(value), "expected a number (spacing above 0 mm, slope not 0) or blank"
            )
    return numbers


def _check_rows(table: Table, frame: pd.DataFrame) -> None:
    """Check ids, splits and paths, then the consistency between rows."""
    problems = Problems(table.path)
    for column in ("study_id", "patient_id", "image_id"):
        if column == "image_id" and column not in table.columns:
            continue
        for row, value in zip(table.rows, frame[column], strict=True):
            if not value:
                problems.add(row, column, "nothing", "expected an id, fill it in")
    for row, split in zip(table.rows, frame["split"], strict=True):
        if split not in SPLITS:
            problems.add(row, "split", shorten(split), "expected train, val or test")
    if "polarity" in frame.columns:
        for row, polarity in zip(table.rows, frame["polarity"], strict=True):
            if polarity not in ("", "inverted"):
                problems.add(row, "polarity", shorten(polarity), "expected inverted (low values are white) or blank")
    _check_together(table, frame, problems)
    for row, image_path in zip(table.rows, frame["image_path"], strict=True):
        if fault := path_fault(image_path):
            problems.add(row, "image_path", *fault)
    _check_unique_images(table, frame, problems)
    _check_one_value(table, frame, "study_id", "patient_id", problems, "a study belongs to one patient, correct an id")
    remedy = "put all images of a patient in one split to avoid leakage"
    _check_one_value(table, frame, "patient_id", "split", problems, remedy)
    problems.raise_if_any()


def _check_together(table: Table, frame: pd.DataFrame, problems: Problems) -> None:
    """Check that slope and intercept, and the three spacings, are set together; a partial set would be ignored."""
    for names in (("slope", "intercept"), ("spacing_x", "spacing_y", "spacing_z")):
        set_count = np.zeros(len(frame), dtype=np.int64)
        for name in set(names) & set(frame.columns):
            set_count += frame[name].notna().to_numpy(dtype=np.int64)
        for place in np.flatnonzero((set_count > 0) & (set_count < len(names))):
            problems.add(
                table.rows[int(place)], names[0], f"{set_count[place]} of {', '.join(names)}", "set all or none"
            )


def _check_unique_images(table: Table, frame: pd.DataFrame, problems: Problems) -> None:
    first: dict[str, int] = {}
    column = "image_id" if "image_id" in table.columns else "study_id"
    remedy = "expected unique image ids, rename one of them"
    if column == "study_id":
        remedy = "add a column image_id with a unique id per image if a study has several images"
    for row, value in zip(table.rows, frame["image_id"], strict=True):
        if value in first:
            problems.add(row, column, f"{shorten(value)} again, as in row {first[value]}", remedy)
        elif value:
            first[value] = row


def _check_one_value(table: Table, frame: pd.DataFrame, key: str, column: str, problems: Problems, remedy: str) -> None:
    """Check that each `key` has one `column` value; a conflict is reported once, at the row of the second value."""
    first: dict[str, tuple[str, int]] = {}
    reported: set[str] = set()
    for row, name, value in zip(table.rows, frame[key], frame[column], strict=True):
        value_before, row_before = first.setdefault(name, (value, row))
        if name and value and value_before and value != value_before and name not in reported:
            reported.add(name)
            found = f"{shorten(value)} for {key} {shorten(name)}, which has {shorten(value_before)} in row {row_before}"
            problems.add(row, column, found, remedy)
