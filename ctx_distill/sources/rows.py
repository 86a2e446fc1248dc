"""What a builder gives: rows of a manifest, and what it left out and why. Writing them is the same for every source."""

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
    """One image; the fields are the columns of a manifest, `image` is its place under the source's root."""

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
    """Rows with the counts of what is not among them.

    Attributes:
        source: name of the data set.
        root: the folder that images lie in.
        rows: in the order of the manifest.
        left_out: images by reason, in words to print.
        notes: sentences to print.
    """

    source: str
    root: Path
    rows: list[ManifestRow] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def hashed_split(source: str, patient_id: str, val: float, test: float = 0.0) -> str:
    """A split that depends on the patient alone: the same in every manifest, whatever else is in it."""
    digest = hashlib.sha256(f"{source}/{patient_id}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < test else "val" if place < test + val else "train"


def one_split_a_patient(built: Built) -> None:
    """A patient whose images stand in several splits goes to test if any is there, else to val; counted in the notes."""
    order = {name: number for number, name in enumerate(SPLITS)}
    last: dict[str, str] = {}
    for row in built.rows:
        last[row.patient_id] = max(last.get(row.patient_id, "train"), row.split, key=order.__getitem__)
    moved = [row for row in built.rows if row.split != last[row.patient_id]]
    for row in moved:
        row.split = last[row.patient_id]
    if moved:
        built.notes.append(
            f"{len({row.patient_id for row in moved})} patients stood in several splits; their {len(moved)} images of the"
            " earlier ones went to the last (test before val before train)"
        )


def present(built: Built, rows: Iterable[ManifestRow], reason: str = "image is not on the disk") -> list[ManifestRow]:
    """The rows whose image lies under the root; the others are counted."""
    kept = []
    for row in rows:
        if (built.root / row.image).exists():
            kept.append(row)
        else:
            built.left_out[reason] += 1
    return kept


def table(path: Path, *columns: str) -> Table:
    """A table of the data set with the columns that the builder needs.

    Raises:
        InputError: missing, unreadable, or without one of the columns.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a table of the data set there, download it or correct ROOT")
    read = read_table(path)
    missing = [name for name in columns if name not in read.columns]
    if missing:
        raise InputError(
            f"{path}: no column {', '.join(missing)}; found {', '.join(list(read.columns)[:12])}; is it this data set's table?"
        )
    return read


def label_value(path: Path, column: str, text: str) -> float | None:
    """A cell of a label column as a number; None where it is blank.

    Raises:
        InputError: it is no number.
    """
    try:
        return float(text) if text.strip() else None
    except ValueError as error:
        raise InputError(
            f"{path}: column {column!r}: found {text!r}; expected a label as a number, or blank"
        ) from error


def write_manifest(built: Built, out: Path) -> str:
    """Check the rows as every manifest is checked, write them, and say in numbers what came in and what did not.

    Paths are relative to OUT's folder where that holds the images; else a column `root` names the images' folder.

    Raises:
        InputError: nothing is left; what `read_manifest` refuses.
    """
    if out.suffix.lower() != ".csv":
        raise InputError(f"{out}: expected a manifest to write, such as {out.with_suffix('.csv')}")
    reasons = "".join(f"\n  left out, {reason}: {count:,}" for reason, count in sorted(built.left_out.items()))
    if not built.rows:
        raise InputError(f"{built.root}: no image of {built.source} is left for a manifest{reasons}")
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
    told = f"{counts(out, built.source, checked)}; {texts:,} images with a report"
    return told + reasons + "".join(f"\n  {note}" for note in built.notes)


def write_checked(out: Path, text: str) -> Manifest:
    """Write a manifest that is read and checked before it takes its name; nothing stays where it is refused."""
    part = out.with_name(f".{out.stem}.part.csv")
    write_text(part, text)
    try:
        checked = read_manifest(part)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return checked


def counts(out: Path, source: str, manifest: Manifest) -> str:
    """Images, studies, patients, and images a split, in words."""
    frame = manifest.frame
    splits = ", ".join(f"{name} {int((frame['split'] == name).sum()):,}" for name in SPLITS)
    return (
        f"{out}: {source}, {len(frame):,} images, {frame['study_id'].nunique():,} studies,"
        f" {frame['patient_id'].nunique():,} patients ({splits})"
    )


def cell(value: object) -> str:
    """A number or text as a manifest holds it; None and NaN are blank."""
    if value is None or value != value:
        return ""
    return repr(float(value)) if isinstance(value, float) else str(value)
