"""The result of a manifest builder (rows, and excluded images by reason), and writing it as a manifest."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ctx_distill.data.manifests.manifest import LABEL, SPLITS, Manifest, read_manifest
from ctx_distill.data.manifests.tables import Table, read_table
from ctx_distill.errors import InputError
from ctx_distill.files import write_text


@dataclass
class ManifestRow:
    """One image; the fields are the columns of a manifest, and `image` is its path relative to the source's root."""

    study_id: str
    patient_id: str
    split: str
    image: Path
    image_id: str
    findings: str = ""
    impression: str = ""
    view: str = ""
    language: str = "en"
    labels: Mapping[str, float | None] = field(default_factory=dict)
    more: Mapping[str, object] = field(default_factory=dict)


@dataclass
class Built:
    """The rows of a manifest and the number of excluded images.

    Attributes:
        source: name of the data set.
        root: folder of the images.
        rows: rows in the order of the manifest.
        left_out: number of excluded images by printable reason.
        notes: messages to print.
    """

    source: str
    root: Path
    rows: list[ManifestRow] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def hashed_split(source: str, patient_id: str, val: float, test: float = 0.0) -> str:
    """Return a split that depends only on the patient, so that it is equal in every manifest."""
    digest = hashlib.sha256(f"{source}/{patient_id}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < test else "val" if place < test + val else "train"


def one_split_per_patient(built: Built) -> None:
    """Move patients with several splits to the last one (test, then val, then train) and note their number."""
    order = {name: number for number, name in enumerate(SPLITS)}
    last: dict[str, str] = {}
    for row in built.rows:
        last[row.patient_id] = max(last.get(row.patient_id, "train"), row.split, key=order.__getitem__)
    moved = [row for row in built.rows if row.split != last[row.patient_id]]
    for row in moved:
        row.split = last[row.patient_id]
    if moved:
        built.notes.append(
            f"{len({row.patient_id for row in moved})} patients were in several splits; {len(moved)} of their images"
            " were moved to one split (test before val before train)"
        )


def present(built: Built, rows: Iterable[ManifestRow], reason: str = "image file does not exist") -> list[ManifestRow]:
    """Return the rows whose image exists; count the others as excluded."""
    kept = []
    for row in rows:
        if (built.root / row.image).exists():
            kept.append(row)
        else:
            built.left_out[reason] += 1
    return kept


def table(path: Path, *columns: str) -> Table:
    """Read a table of the data set with the required columns.

    Raises:
        InputError: the table is missing, unreadable, or lacks a column.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a table of the data set. Download it or correct ROOT")
    contents = read_table(path)
    missing = [name for name in columns if name not in contents.columns]
    if missing:
        raise InputError(
            f"{path}: missing column {', '.join(missing)}; found {', '.join(list(contents.columns)[:12])}. Check that it is a table of this data set"
        )
    return contents


def label_value(path: Path, column: str, text: str) -> float | None:
    """Return a cell of a label column as a number, or None if blank.

    Raises:
        InputError: the cell is not a number.
    """
    try:
        return float(text) if text.strip() else None
    except ValueError as error:
        raise InputError(f"{path}: column {column!r}: found {text!r}; expected a number or blank") from error


def write_manifest(built: Built, out: Path) -> str:
    """Check and write the rows, and return a summary of included and excluded images.

    Paths are relative to the folder of OUT if it contains the images; otherwise a column `root` names their folder.

    Raises:
        InputError: no row remains, or `read_manifest` rejects the manifest.
    """
    if out.suffix.lower() != ".csv":
        raise InputError(f"{out}: expected a .csv file for the manifest, such as {out.with_suffix('.csv')}")
    reasons = "".join(f"\n  excluded, {reason}: {count:,}" for reason, count in sorted(built.left_out.items()))
    if not built.rows:
        raise InputError(f"{built.root}: no image of {built.source} remains for the manifest{reasons}")
    root, folder = built.root.resolve(), out.parent.resolve()
    inside = root == folder or folder in root.parents
    findings = list(dict.fromkeys(name for row in built.rows for name in row.labels))
    more = list(dict.fromkeys(name for row in built.rows for name in row.more))
    head = ["study_id", "patient_id", "split", "image_path", "findings", "impression", "image_id", "view", "language"]
    head += ["source", *([] if inside else ["root"]), *more, *(LABEL + name for name in findings)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for row in built.rows:
        path = (root.relative_to(folder) / row.image if inside else row.image).as_posix()
        labels = [row.labels.get(name) for name in findings]
        writer.writerow(
            [row.study_id, row.patient_id, row.split, path, row.findings, row.impression, row.image_id, row.view]
            + [row.language, built.source, *([] if inside else [str(root)])]
            + [cell(row.more.get(name)) for name in more]
            + ["" if value is None else f"{value:g}" for value in labels]
        )
    checked = write_checked(out, text.getvalue())
    texts = sum(bool(row.findings or row.impression) for row in built.rows)
    summary = f"{counts(out, built.source, checked)}; {texts:,} images with a report"
    return summary + reasons + "".join(f"\n  {note}" for note in built.notes)


def write_checked(out: Path, text: str) -> Manifest:
    """Write a manifest under a temporary name, check it, and rename it; leave no file if it is rejected."""
    part = out.with_name(f".{out.stem}.part.csv")
    write_text(part, text)
    try:
        checked = read_manifest(part)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return checked


def counts(out: Path, source: str, manifest: Manifest) -> str:
    """Return a text with the numbers of images, studies and patients, and of images per split."""
    frame = manifest.frame
    splits = ", ".join(f"{name} {int((frame['split'] == name).sum()):,}" for name in SPLITS)
    return (
        f"{out}: {source}, {len(frame):,} images, {frame['study_id'].nunique():,} studies,"
        f" {frame['patient_id'].nunique():,} patients ({splits})"
    )


def cell(value: object) -> str:
    """Format a number or text for a manifest; None and NaN are blank."""
    if value is None or value != value:
        return ""
    return repr(float(value)) if isinstance(value, float) else str(value)
