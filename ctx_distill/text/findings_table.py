"""Implement `ctx-distill findings`: add the findings of reports as columns to a table."""

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
from ctx_distill.text.findings_table_parts import completed_parts, parts_folder, request_hash, write_part
from ctx_distill.text.report_text import join_sections
from ctx_distill.text.sections import cut_report

_PART = 500
_FEW = 4000
"""Below this number of reports, starting processes takes longer than the extraction."""

_ID_COLUMNS = ("study_id", "image_id", "VolumeName", "id", "uid", "patient_id")
_FOREIGN_SHARE = 0.1

_Part = tuple[int, tuple[str, ...]]
_Row = tuple[dict[str, int], dict[str, str], bool]
"""Assertions of a report, its sides, and whether it seems to be in another language."""


def report_texts(table: Table) -> tuple[list[str], str]:
    """Return the reports of a table and the names of their columns.

    `report_text` is first split at its headings; history, indication and technique are dropped.

    Raises:
        InputError: the table has none of `report_text`, `findings` and `impression`.
    """
    columns = table.columns
    if "report_text" in columns:
        return [join_sections(*cut_report(text)) for text in columns["report_text"]], "report_text"
    read = [name for name in ("findings", "impression") if name in columns]
    if not read:
        raise InputError(
            f"{table.path}: the header is {', '.join(columns) or 'empty'}; expected column report_text, or findings and "
            "impression. Rename the column with the reports"
        )
    blank = [""] * len(table.rows)
    pairs = zip(columns.get("findings", blank), columns.get("impression", blank), strict=True)
    return [join_sections(findings, impression) for findings, impression in pairs], " and ".join(read)


def write_findings(
    source: Path, out: Path, vocabulary: str, prefix: str = "", sides: bool = False, workers: int | None = None
) -> str:
    """Write `source` with one column per finding: 1 present, 0 absent, -1 uncertain, blank if not mentioned.

    The table is written atomically. For many reports, completed parts are stored next to it, and repeating an interrupted
    call resumes from them. If `source` has labels of the vocabulary (a column named like a finding, or
    `label:<finding>`), labels that contradict the text are listed in `<stem of out>.contradictions.csv`.

    Args:
        source: CSV (UTF-8) or Parquet with `report_text`, or `findings` and `impression`.
        out: table to write, .csv or .parquet.
        vocabulary: name or YAML file.
        prefix: prefix of the finding names in the header.
        sides: also write `side:<finding>`: left, right, both or blank.
        workers: number of processes; None uses one per core.

    Returns:
        A summary for the terminal, including warnings.

    Raises:
        InputError: an unreadable table, missing columns, a column named like a finding, an invalid label, or an unknown
            vocabulary or suffix.
        StopRequested: stopped by a signal.
    """
    names = load_vocabulary(vocabulary).names
    if out.suffix.lower() not in (".csv", ".parquet"):
        raise InputError(f"{out}: unknown suffix {out.suffix!r}; expected .csv or .parquet, change the file name")
    if out.exists() and source.exists() and out.samefile(source):
        raise InputError(f"{out}: input and output are the same file; choose another output file")
    table = read_table(source)
    added = [prefix + name for name in names] + ([f"side:{name}" for name in names] if sides else [])
    duplicates = [name for name in added if name in table.columns]
    if duplicates:
        raise InputError(
            f"{source}: column {duplicates[0]!r} exists already; choose another --prefix, such as 'found:'"
        )
    texts, read = report_texts(table)
    labels = _labels(table, names)
    folder = parts_folder(out)
    rows = _read_all(texts, vocabulary, workers, folder, source)
    columns = dict(table.columns)
    for name in names:
        columns[prefix + name] = [str(findings.get(name, "")) for findings, _, _ in rows]
    if sides:
        for name in names:
            columns[f"side:{name}"] = [sides_of_row.get(name, "") for _, sides_of_row, _ in rows]
    label_lines = [_write_contradictions(table, out, labels, rows)] if labels else []
    (_write_parquet if out.suffix.lower() == ".parquet" else _write_csv)(out, columns)
    shutil.rmtree(folder, ignore_errors=True)
    empty = sum(not text for text in texts)
    without_text = f"; {empty:,} without text" if empty else ""
    head = f"{out}: {len(rows):,} reports ({read}), {len(names)} findings of {vocabulary}{without_text}"
    return "\n".join([head, *label_lines, *_foreign_warning(table, rows, len(rows) - empty)])


def _labels(table: Table, names: Sequence[str]) -> dict[str, list[float | None]]:
    """Return the table's label columns of the vocabulary's findings."""
    labels = {}
    for name in names:
        column = next((c for c in (f"label:{name}", name) if c in table.columns), None)
        if column is not None:
            where = f"{table.path}, column {column!r}, row"
            labels[name] = [
                label_value(f"{where} {row}", cell) for row, cell in zip(table.rows, table.columns[column], strict=True)
            ]
    return labels


def _write_contradictions(table: Table, out: Path, labels: dict[str, list[float | None]], rows: Sequence[_Row]) -> str:
    """Write the list of contradictions next to `out` and return a summary line."""
    comparison = compare(labels, [report for report, _, _ in rows])
    key = next((name for name in _ID_COLUMNS if name in table.columns), None)
    ids = table.columns[key] if key else [""] * len(table.rows)
    path = out.with_name(f"{out.stem}.contradictions.csv")
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", key or "id", "finding", "label", "text"])
    writer.writerows((table.rows[c.place], ids[c.place], c.finding, c.label, c.text) for c in comparison.contradictions)
    write_text(path, text.getvalue())
    studies = len({c.place for c in comparison.contradictions})
    return (
        f"labels of {len(labels)} findings: {len(comparison.contradictions):,} of {comparison.compared:,} contradict the text, in {studies:,}"
        f" reports ({path}); {comparison.unmentioned:,} positive labels are not mentioned in the text"
    )


def _foreign_warning(table: Table, rows: Sequence[_Row], with_text: int) -> list[str]:
    foreign = [row for row, (_, _, odd) in zip(table.rows, rows, strict=True) if odd]
    if len(foreign) <= _FOREIGN_SHARE * with_text:
        return []
    return [
        f"warning: {len(foreign):,} of {with_text:,} reports contain hardly any known word (first: row {foreign[0]});"
        " the extractor supports English only, so their blanks are meaningless. Translate them first"
    ]


def _read_all(texts: Sequence[str], vocabulary: str, workers: int | None, folder: Path, source: Path) -> list[_Row]:
    read = functools.partial(_read_part, vocabulary=vocabulary)
    if len(texts) < _FEW:
        return read((0, tuple(texts)))
    parts: list[_Part] = [(i, tuple(texts[i : i + _PART])) for i in range(0, len(texts), _PART)]
    by_place = completed_parts(folder, request_hash(source, vocabulary, _PART))
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
