"""`ctx-distill findings`: the findings of a table of reports as columns of the same table."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from ctx_distill.data.tables import Table, read_table
from ctx_distill.errors import InputError
from ctx_distill.files import write_bytes, write_text
from ctx_distill.parallel import in_processes, usable_cores
from ctx_distill.text.findings import extract, extract_sides, load_vocabulary
from ctx_distill.text.report import join_sections
from ctx_distill.text.sections import cut_report

_PART = 500
_FEW = 4000
"""Fewer reports than this are read before a second process would have started."""

_Part = tuple[int, tuple[str, ...]]
_Row = tuple[list[str], list[str]]


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
            f"{table.path}: found the columns {', '.join(columns) or 'none'}; expected report_text, or findings and "
            "impression: rename the column that holds the reports"
        )
    blank = [""] * len(table.rows)
    pairs = zip(columns.get("findings", blank), columns.get("impression", blank), strict=True)
    return [join_sections(findings, impression) for findings, impression in pairs], " and ".join(read)


def write_findings(
    source: Path, out: Path, vocabulary: str, prefix: str = "", sides: bool = False, workers: int | None = None
) -> str:
    """Write `source` with a column a finding: 1 present, 0 absent, -1 uncertain, blank where it is not mentioned.

    Args:
        source: CSV (UTF-8) or Parquet with `report_text`, or `findings` and `impression`.
        out: the table to write, .csv or .parquet; whole, or not at all.
        vocabulary: name or YAML file.
        prefix: put before the findings' names in the header.
        sides: also write `side:<finding>`: left, right, both or blank.
        workers: processes; None takes one a core.

    Returns:
        What was done, for the terminal.

    Raises:
        InputError: an unreadable table, missing columns, a column of a finding's name, an unknown vocabulary or suffix.
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
    rows = _read_all(texts, vocabulary, workers)
    columns = dict(table.columns)
    for i, name in enumerate(names):
        columns[prefix + name] = [values[i] for values, _ in rows]
    if sides:
        for i, name in enumerate(names):
            columns[f"side:{name}"] = [told[i] for _, told in rows]
    (_write_parquet if out.suffix.lower() == ".parquet" else _write_csv)(out, columns)
    empty = sum(not text for text in texts)
    blank = f"; {empty:,} without text" if empty else ""
    return f"{out}: {len(rows):,} reports ({read}), {len(names)} findings of {vocabulary}{blank}"


def _read_all(texts: Sequence[str], vocabulary: str, workers: int | None) -> list[_Row]:
    read = functools.partial(_read_part, vocabulary=vocabulary)
    parts: list[_Part] = [(i, tuple(texts[i : i + _PART])) for i in range(0, len(texts), _PART)]
    workers = workers or usable_cores()
    done: Iterator[tuple[_Part, list[_Row]]]
    if len(texts) < _FEW or workers == 1:
        done = ((part, read(part)) for part in parts)
    else:
        done = in_processes("findings", read, parts, len(parts), workers)
    by_place = {part[0]: rows for part, rows in done}
    return [row for place in sorted(by_place) for row in by_place[place]]


def _read_part(part: _Part, vocabulary: str) -> list[_Row]:
    words = load_vocabulary(vocabulary)
    rows = []
    for text in part[1]:
        found, sides = extract(text, words), extract_sides(text, words)
        rows.append(([str(found.get(n, "")) for n in words.names], [sides.get(n, "") for n in words.names]))
    return rows


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
