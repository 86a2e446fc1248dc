"""`ctx-distill findings`: the findings of a table of reports as columns of the same table."""

from __future__ import annotations

import csv
import functools
import io
import shutil
from collections.abc import Sequence
from pathlib import Path

from ctx_distill.data.manifests.tables import Table, read_table
from ctx_distill.errors import InputError
from ctx_distill.files import write_bytes, write_text
from ctx_distill.parallel import in_processes, usable_cores
from ctx_distill.text.contradictions import compare, label_value
from ctx_distill.text.extractor import extract, extract_sides, load_vocabulary
from ctx_distill.text.familiarity import is_foreign
from ctx_distill.text.findings_table_parts import parts_folder, request_hash, standing_parts, write_part
from ctx_distill.text.report_text import join_sections
from ctx_distill.text.sections import cut_report

_PART = 500
_FEW = 4000
"""Fewer reports than this are read before a second process would have started."""

_ID_COLUMNS = ("study_id", "image_id", "VolumeName", "id", "uid", "patient_id")
_FOREIGN_SHARE = 0.1

_Part = tuple[int, tuple[str, ...]]
_Row = tuple[dict[str, int], dict[str, str], bool]
"""What a report asserts, its sides, and whether it seems to be in another language."""


def report_texts(table: Table) -> tuple[list[str], str]:
    """The reports of a table, and the columns that they come from.

    `report_text` is cut at its headings first (history, indication and technique say nothing of the picture).

    Raises:
        InputError: neither `report_text`, nor `findings` or `impression`.
    """
    columns = table.columns
    if "report_text" in columns:
        return [join_sections(*cut_report(text)) for text in columns["report_text"]], "report_text"
    read = [name for name in ("findings", "impression") if name in columns]
    if not read:
        raise InputError(
            f"{table.path}: found the header {', '.join(columns) or 'none'}; expected report_text, or findings and "
            "impression: rename the column that holds the reports"
        )
    blank = [""] * len(table.rows)
    pairs = zip(columns.get("findings", blank), columns.get("impression", blank), strict=True)
    return [join_sections(findings, impression) for findings, impression in pairs], " and ".join(read)


def write_findings(
    source: Path, out: Path, vocabulary: str, prefix: str = "", sides: bool = False, workers: int | None = None
) -> str:
    """Write `source` with a column a finding: 1 present, 0 absent, -1 uncertain, blank where it is not mentioned.

    A stop leaves no half table; of many reports the parts that were read stand beside it, and the same call goes on
    with the others. Where `source` holds labels of the vocabulary (a column named as a finding, or `label:<finding>`), those that the text contradicts are
    listed in `<out's stem>.contradictions.csv`.

    Args:
        source: CSV (UTF-8) or Parquet with `report_text`, or `findings` and `impression`.
        out: the table to write, .csv or .parquet; whole, or not at all.
        vocabulary: name or YAML file.
        prefix: put before the findings' names in the header.
        sides: also write `side:<finding>`: left, right, both or blank.
        workers: processes; None takes one a core.

    Returns:
        What was done, for the terminal, warnings included.

    Raises:
        InputError: an unreadable table, missing columns, a column of a finding's name, a label that is none, an unknown
            vocabulary or suffix.
        StopRequested: a signal asked for it.
    """
    names = load_vocabulary(vocabulary).names
    if out.suffix.lower() not in (".csv", ".parquet"):
        raise InputError(f"{out}: unknown suffix {out.suffix!r}; expected .csv or .parquet, give another name")
    if out.exists() and source.exists() and out.samefile(source):
        raise InputError(f"{out}: is the table that is read; give another file to write")
    table = read_table(source)
    added = [prefix + name for name in names] + ([f"side:{name}" for name in names] if sides else [])
    doubled = [name for name in added if name in table.columns]
    if doubled:
        raise InputError(f"{source}: holds a column {doubled[0]!r} already; give another --prefix, such as 'found:'")
    texts, read = report_texts(table)
    labels = _labels(table, names)
    folder = parts_folder(out)
    rows = _read_all(texts, vocabulary, workers, folder, source)
    columns = dict(table.columns)
    for name in names:
        columns[prefix + name] = [str(found.get(name, "")) for found, _, _ in rows]
    if sides:
        for name in names:
            columns[f"side:{name}"] = [told.get(name, "") for _, told, _ in rows]
    told = [_told_labels(table, out, labels, rows)] if labels else []
    (_write_parquet if out.suffix.lower() == ".parquet" else _write_csv)(out, columns)
    shutil.rmtree(folder, ignore_errors=True)
    empty = sum(not text for text in texts)
    blank = f"; {empty:,} without text" if empty else ""
    head = f"{out}: {len(rows):,} reports ({read}), {len(names)} findings of {vocabulary}{blank}"
    return "\n".join([head, *told, *_told_foreign(table, rows, len(rows) - empty)])


def _labels(table: Table, names: Sequence[str]) -> dict[str, list[float | None]]:
    """The label columns of the vocabulary's findings that a table holds."""
    labels = {}
    for name in names:
        column = next((c for c in (f"label:{name}", name) if c in table.columns), None)
        if column is not None:
            where = f"{table.path}, column {column!r}, row"
            labels[name] = [
                label_value(f"{where} {row}", cell) for row, cell in zip(table.rows, table.columns[column], strict=True)
            ]
    return labels


def _told_labels(table: Table, out: Path, labels: dict[str, list[float | None]], rows: Sequence[_Row]) -> str:
    """Write the list of contradictions beside `out`, and say how many there are."""
    found = compare(labels, [report for report, _, _ in rows])
    key = next((name for name in _ID_COLUMNS if name in table.columns), None)
    ids = table.columns[key] if key else [""] * len(table.rows)
    path = out.with_name(f"{out.stem}.contradictions.csv")
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", key or "id", "finding", "label", "text"])
    writer.writerows((table.rows[c.place], ids[c.place], c.finding, c.label, c.text) for c in found.contradictions)
    write_text(path, text.getvalue())
    studies = len({c.place for c in found.contradictions})
    return (
        f"labels of {len(labels)} findings: {len(found.contradictions):,} of {found.compared:,} contradict the text, in {studies:,}"
        f" reports ({path}); {found.unmentioned:,} of 1 are not mentioned in it"
    )


def _told_foreign(table: Table, rows: Sequence[_Row], with_text: int) -> list[str]:
    foreign = [row for row, (_, _, odd) in zip(table.rows, rows, strict=True) if odd]
    if len(foreign) <= _FOREIGN_SHARE * with_text:
        return []
    return [
        f"warning: {len(foreign):,} of {with_text:,} reports hold hardly any word that the extractor knows (first: row {foreign[0]});"
        " it reads English only, and their blanks mean nothing: translate them first"
    ]


def _read_all(texts: Sequence[str], vocabulary: str, workers: int | None, folder: Path, source: Path) -> list[_Row]:
    read = functools.partial(_read_part, vocabulary=vocabulary)
    if len(texts) < _FEW:
        return read((0, tuple(texts)))
    parts: list[_Part] = [(i, tuple(texts[i : i + _PART])) for i in range(0, len(texts), _PART)]
    by_place = standing_parts(folder, request_hash(source, vocabulary, _PART))
    waiting = [part for part in parts if part[0] not in by_place]
    for part, rows in in_processes("findings", read, waiting, len(waiting), workers or usable_cores()):
        write_part(folder, part[0], rows)
        by_place[part[0]] = rows
    return [row for place in sorted(by_place) for row in by_place[place]]


def _read_part(part: _Part, vocabulary: str) -> list[_Row]:
    known = load_vocabulary(vocabulary)
    return [(extract(text, known), extract_sides(text, known), is_foreign(text)) for text in part[1]]


def _write_csv(out: Path, columns: dict[str, list[str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_text(out, text.getvalue())


def _write_parquet(out: Path, columns: dict[str, list[str]]) -> None:
    import pyarrow
    import pyarrow.parquet

    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    write_bytes(out, memoryview(buffer.getvalue()))
