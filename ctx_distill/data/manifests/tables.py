"""Read CSV and Parquet as text columns with row numbers, without type inference: "007" and "NA" are unchanged.

pandas' readers are not used because they coerce ids, drop the line numbers that users need to locate a problem, and pad
rows that are too short.
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

# A long report can exceed the csv module's 128 KiB; more than 1 MiB in a cell means a missing quotation mark.
_FIELD_LIMIT = 1 << 20


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        path: table file.
        columns: one string per row by column name; a blank, null or absent value is "".
        rows: number of each row as shown to users: for CSV the line in an editor (the header is line 1; a row with
            quoted line breaks has the number of its first line), for Parquet the record from 1.
    """

    path: Path
    columns: dict[str, list[str]]
    rows: list[int]


def read_table(path: Path) -> Table:
    """Read a CSV (UTF-8, comma, header) or Parquet file.

    Raises:
        InputError: a missing, unreadable, undecodable or damaged file, an unknown suffix, repeated column names, or rows
            whose length differs from the header's.
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
        raise InputError(f"{path}: cannot read the file ({error.strerror or error}); check its permissions") from error
    raise InputError(f"{path}: unknown suffix {path.suffix!r}; expected .csv or .parquet, rename or convert the file")


def _check_header(path: Path, header: list[str]) -> None:
    duplicates = [name for name, n in Counter(header).items() if n > 1]
    if duplicates:
        raise InputError(
            f"{path}: column {shorten(duplicates[0])} occurs more than once in the header; rename or remove the repeats"
        )


def _check_separator(path: Path, header: list[str]) -> None:
    separator = next((mark for mark in (";", "\t", "|") if len(header) == 1 and mark in header[0]), None)
    if separator:
        raise InputError(
            f"{path}: the header {shorten(header[0])} is separated by {separator!r}; expected commas. Convert the file,"
            f" for example:  pandas.read_csv(path, sep={separator!r}, dtype=str).to_csv(path, index=False)"
        )


def _read_csv(path: Path) -> Table:
    try:
        # "utf-8-sig" because spreadsheet programs write a byte-order mark before the first column name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            return parse_csv(path, file)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: {_undecodable(path)}; save the file as UTF-8, for example: iconv -f latin1 -t utf-8"
        ) from error


def parse_csv(path: Path, file: TextIO) -> Table:
    """Parse an open CSV file as `read_table` does; `path` is for messages."""
    with field_limit():
        return _parse_csv(path, csv.reader(file, strict=True))


@contextmanager
def field_limit() -> Iterator[None]:
    """Allow cells of up to 1 MiB within the context."""
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
            if not record:  # empty line, as editors leave at the end
                continue
            if len(record) != len(header):
                problems.add(
                    start, header[0], f"{len(record)} values", f"expected {len(header)} as in the header; quote texts "
                    'that contain commas or line breaks ("...", with "" for a quotation mark inside)',
                )  # fmt: skip
                continue
            rows.append(start)
            values.append(record)
    except csv.Error as error:
        raise InputError(
            f"{path}: row {line + 1}: not valid CSV ({error}); check for an unclosed quotation mark"
        ) from error
    if header is None:
        raise InputError(f"{path}: empty file; expected a header and one row per image")
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
        dtype = column.type
        is_label = name.startswith("label:")
        if pyarrow.types.is_dictionary(dtype):
            column, dtype = column.cast(dtype.value_type), dtype.value_type
        if pyarrow.types.is_floating(dtype) and not is_label and column.null_count < len(column):
            raise InputError(
                f"{path}: column {name!r} has type {dtype}; expected text, because numbers lose leading zeros and "
                "become '7.0'. Write the column as strings"
            )
        columns[name] = [as_text(value) for value in column.to_pylist()]
    return Table(path, columns, list(range(1, table.num_rows + 1)))


def as_text(value: object) -> str:
    """Return a Parquet value as the text that a CSV would contain."""
    if value is None:
        return ""
    if isinstance(value, float):  # only in label columns, where pandas writes a blank as NaN
        return "" if value != value else f"{value:g}"
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return str(value)
