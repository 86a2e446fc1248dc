"""CSV and Parquet as columns of text with row numbers: nothing is guessed, so "007" stays "007" and "NA" stays "NA".

pandas' readers are not used on purpose: they coerce ids, drop the line numbers that a user needs to find a fault, and
fill rows that are too short.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ctx_distill.data.manifests.problems import Problems, shorten
from ctx_distill.errors import InputError

# A report of a long stay can be more than the csv module's 128 KiB; a megabyte in one cell is a lost quotation mark.
_FIELD_LIMIT = 1 << 20


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        path: the file.
        columns: name -> one string a row; a blank, null or absent value is "".
        rows: the number a user sees for each row: the line in an editor for CSV (the header is line 1; a row with line
            breaks inside quotes counts from its first line), the record from 1 for Parquet.
    """

    path: Path
    columns: dict[str, list[str]]
    rows: list[int]


def read_table(path: Path) -> Table:
    """Reads a CSV (UTF-8, comma, header) or Parquet file.

    Raises:
        InputError: a missing, unreadable, undecodable or damaged file, another suffix, repeated column names, rows of
            another length than the header.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; expected a manifest (.csv or .parquet), check the path")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected a manifest file, for example {path / 'ct.csv'}")
    suffix = path.suffix.lower()
    try:
        if suffix == ".csv":
            return _read_csv(path)
        if suffix in (".parquet", ".pq"):
            return _read_parquet(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the file's permissions") from error
    raise InputError(f"{path}: unknown suffix {path.suffix!r}; expected .csv or .parquet, rename or convert the file")


def _check_header(path: Path, header: list[str]) -> None:
    doubled = [name for name, n in Counter(header).items() if n > 1]
    if doubled:
        raise InputError(f"{path}: column {shorten(doubled[0])} stands twice in the header; rename or drop one of them")


def _check_separator(path: Path, header: list[str]) -> None:
    other = next((mark for mark in (";", "\t", "|") if len(header) == 1 and mark in header[0]), None)
    if other:
        raise InputError(
            f"{path}: found the header {shorten(header[0])}, one column parted by {other!r}; expected commas: save it as CSV"
            f" with commas, for example: pandas.read_csv(path, sep={other!r}, dtype=str).to_csv(path, index=False)"
        )


def _read_csv(path: Path) -> Table:
    try:
        # "utf-8-sig" because spreadsheet programs put a byte-order mark in front of the first column's name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            return parse_csv(path, file)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: {_undecodable(path)}; save the file as UTF-8, for example: iconv -f latin1 -t utf-8"
        ) from error


def parse_csv(path: Path, file: TextIO) -> Table:
    """An open text as `read_table` reads a CSV; `path` is for messages."""
    with field_limit():
        return _parse_csv(path, csv.reader(file, strict=True))


@contextmanager
def field_limit() -> Iterator[None]:
    """Cells of up to a megabyte while it lasts."""
    limit = csv.field_size_limit(_FIELD_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _undecodable(path: Path) -> str:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"row {number} is not UTF-8 (byte {line[error.start]:#04x} at position {error.start + 1})"
    return "not UTF-8"


def _parse_csv(path: Path, reader: Any) -> Table:
    problems = Problems(path)
    rows: list[int] = []
    values: list[list[str]] = []
    header: list[str] | None = None
    line = 0
    try:
        for record in reader:
            start, line = line + 1, reader.line_num
            if header is None:
                header = [name.strip() for name in record]
                _check_header(path, header)
                _check_separator(path, header)
                continue
            if not record:  # an empty line, as editors leave at the end
                continue
            if len(record) != len(header):
                problems.add(
                    start, header[0], f"{len(record)} values", f"expected {len(header)} as in the header; quote texts "
                    'that hold commas or line breaks ("...", with "" for a quotation mark inside)',
                )  # fmt: skip
                continue
            rows.append(start)
            values.append(record)
    except csv.Error as error:
        raise InputError(
            f"{path}: row {line + 1}: not valid CSV ({error}); look for a quotation mark that is never closed"
        ) from error
    if header is None:
        raise InputError(f"{path}: the file is empty; expected a header and a row an image")
    problems.raise_if_any()
    columns = {name: [record[i] for record in values] for i, name in enumerate(header)}
    return Table(path, columns, rows)


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, partitioning=None)
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); write it again") from error
    _check_header(path, list(table.column_names))
    columns: dict[str, list[str]] = {}
    for name in table.column_names:
        column = table.column(name)
        kind = column.type
        is_label = name.startswith("label:")
        if pyarrow.types.is_dictionary(kind):
            column, kind = column.cast(kind.value_type), kind.value_type
        if pyarrow.types.is_floating(kind) and not is_label and column.null_count < len(column):
            raise InputError(
                f"{path}: column {name!r} has type {kind}; expected text: numbers lose leading zeros and become "
                "'7.0', write the column as strings"
            )
        columns[name] = [as_text(value) for value in column.to_pylist()]
    return Table(path, columns, list(range(1, table.num_rows + 1)))


def as_text(value: object) -> str:
    """A Parquet value as the text that a CSV would hold."""
    if value is None:
        return ""
    if isinstance(value, float):  # only label columns come here: NaN is how pandas writes a blank
        return "" if value != value else f"{value:g}"
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return str(value)
