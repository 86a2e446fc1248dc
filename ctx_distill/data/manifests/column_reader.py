"""A manifest's columns as Arrow arrays: read in parts, checked by column, and mapped from a cache file where they are large.

No text becomes a Python object that stays: a million reports take a gigabyte as Arrow strings and four as Python's. What
is found wrong here is not explained here: `manifest.read_manifest` then reads the file row by row for its messages.

The cache is `FOLDER/NAME-PLACE-KEY.arrow`, Arrow's file format. `KEY` is a SHA-256 of the manifest's bytes and of the code
that reads it, so another content or version has another file, and the files of the one before are deleted. `PLACE` is a
hash of the manifest's path. Files are written under a temporary name and renamed; several processes may write the same one. FOLDER is `CTX_DISTILL_CACHE`, or else `.ctx-distill-cache` beside the manifest,
where the reports are kept under the same access rights; where neither can be written nothing is cached.
"""

from __future__ import annotations

import csv
import glob
import mmap
import os
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ctx_distill.data.manifests.image_paths import path_fault
from ctx_distill.data.manifests.tables import as_text, field_limit
from ctx_distill.files import hash_file, hash_json

SPLITS = ("train", "val", "test")
REQUIRED = ("study_id", "patient_id", "split", "image_path", "findings", "impression")
OPTIONAL = ("image_id", "view", "language")
PLACES = ("source", "root", "polarity")
"""Optional text: the data set a row is of, the folder its path is relative to, and `inverted` for a white-is-low film."""
NUMBERS = ("slope", "intercept", "spacing_x", "spacing_y", "spacing_z")
"""Optional numbers that override a scan's header, see `ScanFile`."""
LABEL = "label:"

CACHE_VARIABLE = "CTX_DISTILL_CACHE"
SMALLEST_CACHED = 8 << 20
"""Bytes of a manifest from which on its columns are cached; a smaller one is read in a second or less."""
_CODE = ("column_reader.py", "tables.py")
_PART = 8192

# pandas writes a column of 1, 0 and blanks as "1.0", "0.0" and "".
LABEL_VALUES: Mapping[str, float] = {
    "": float("nan"), "1": 1.0, "0": 0.0, "-1": -1.0, "1.0": 1.0, "0.0": 0.0, "-1.0": -1.0, "-0": 0.0, "-0.0": 0.0,
}  # fmt: skip


_MAPPINGS: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


class _NotClean(Exception):
    """The file holds something that the row-by-row reader must look at."""


def cache_folder(manifest: Path) -> Path | None:
    """The folder for what is computed from a manifest; None where it cannot be written."""
    given = os.environ.get(CACHE_VARIABLE)
    folder = Path(given) if given else manifest.parent / ".ctx-distill-cache"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def cache_file(manifest: Path, key: str, kind: str) -> Path | None:
    """Where something computed from a manifest is kept; None where nothing can be.

    Args:
        manifest: the manifest's path.
        key: its `content_key`.
        kind: ending of the file's name.
    """
    folder = cache_folder(manifest)
    return None if folder is None else folder / f"{_cache_stem(manifest)}-{key}.{kind}"


def _cache_stem(manifest: Path) -> str:
    return f"{manifest.stem}-{hash_json(str(manifest.resolve()))[:8]}"


def _delete_former(manifest: Path, key: str, folder: Path) -> None:
    """Delete what was kept of a former content; a process that has it mapped keeps its mapping."""
    for path in folder.glob(f"{glob.escape(_cache_stem(manifest))}-*"):
        if not path.name.startswith(f"{_cache_stem(manifest)}-{key}."):
            path.unlink(missing_ok=True)


def content_key(path: Path) -> str | None:
    """A key of a manifest's bytes and of the code that reads them; None for a file that is too small to be cached."""
    try:
        if path.stat().st_size < SMALLEST_CACHED:
            return None
        code = [hash_file(Path(__file__).with_name(name)) for name in _CODE]
        return hash_json([hash_file(path), *code])[:32]
    except OSError:
        return None


def read_columns(path: Path, key: str | None) -> Any | None:
    """The checked columns of a manifest as a `pyarrow.Table`; None where the row-by-row reader must explain a fault.

    Args:
        path: a .csv or .parquet file.
        key: its `content_key`; None caches nothing.
    """
    import pyarrow as pa

    cached = None if key is None else cache_file(path, key, "arrow")
    if cached is not None and cached.is_file():
        try:
            return _mapped(cached)
        except (OSError, ValueError, pa.ArrowException):  # ValueError: an empty file
            cached.unlink(missing_ok=True)
    try:
        batches = _batches(path)
        if cached is None:
            held = list(batches)
            table = pa.Table.from_batches(held) if held else None
            return table if table is not None and _is_clean(table) else None
        table = _through_cache(batches, cached)
        if table is not None and key is not None:
            _delete_former(path, key, cached.parent)
        return table
    except (_NotClean, OSError, ValueError, csv.Error, pa.ArrowException):
        return None


def _through_cache(batches: Iterator[Any], cached: Path) -> Any | None:
    """Write the columns to the cache part by part, map them, and name the file once they are checked."""
    import pyarrow as pa

    part = cached.with_name(f".{cached.name}.{uuid.uuid4().hex}.part")
    try:
        first = next(batches, None)
        if first is None:
            return None
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
            writer.write_batch(first)
            for batch in batches:
                writer.write_batch(batch)
        table = _mapped(part)
        if not _is_clean(table):
            return None
        part.replace(cached)  # what is mapped stays mapped under its new name
        return table
    finally:
        part.unlink(missing_ok=True)


def _mapped(path: Path) -> Any:
    import pyarrow as pa

    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _MAPPINGS.add(mapping)
    return pa.ipc.open_file(pa.py_buffer(mapping)).read_all()


def release_pages() -> None:
    """Remove the mapped columns from this process's memory. They are read from the file again when they are used.

    Call it while all text of a manifest is read once: the text would otherwise stay in memory until memory is short.
    """
    for mapping in list(_MAPPINGS):
        if hasattr(mapping, "madvise"):
            mapping.madvise(mmap.MADV_DONTNEED)


def _batches(path: Path) -> Iterator[Any]:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file, field_limit():
            yield from _csv_batches(csv.reader(file, strict=True))
    elif suffix in (".parquet", ".pq"):
        yield from _parquet_batches(path)
    else:
        raise _NotClean


def _csv_batches(reader: Iterator[list[str]]) -> Iterator[Any]:
    header = [name.strip() for name in next(reader, [])]
    _check_header(header)
    while records := list(islice(reader, _PART)):
        rows = [record for record in records if record]
        if any(len(record) != len(header) for record in rows):
            raise _NotClean
        if rows:
            yield _batch(dict(zip(header, zip(*rows, strict=True), strict=True)), len(rows))


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        _check_header(file.schema_arrow.names)
        for field in file.schema_arrow:
            kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            if pa.types.is_floating(kind) and not field.name.startswith(LABEL):
                raise _NotClean
        wanted = [name for name in file.schema_arrow.names if _is_used(name)]
        for batch in file.iter_batches(batch_size=_PART, columns=wanted):
            yield _batch({n: [as_text(value) for value in batch.column(n).to_pylist()] for n in wanted}, batch.num_rows)


def _is_used(name: str) -> bool:
    return name in (*REQUIRED, *OPTIONAL, *PLACES, *NUMBERS) or name.startswith(LABEL)


def _check_header(header: Sequence[str]) -> None:
    findings = [name.removeprefix(LABEL).strip() for name in header if name.startswith(LABEL)]
    whole = set(REQUIRED) <= set(header) and len(set(header)) == len(header)
    if not whole or not all(findings) or len(set(findings)) < len(findings):
        raise _NotClean


def _batch(columns: Mapping[str, Sequence[str]], rows: int) -> Any:
    """Text columns stripped, numbers and labels as floats; columns outside the schema are left out."""
    import pyarrow as pa

    data: dict[str, Any] = {}
    for name in (*REQUIRED, *OPTIONAL, *(name for name in PLACES if name in columns)):
        values = columns.get("study_id" if name == "image_id" and name not in columns else name, [""] * rows)
        # Stripped, because "p1 " and "p1" would be two patients, and one could sit in train and the other in test.
        data[name] = pa.array([value.strip() for value in values], type=pa.large_string())
    for name in NUMBERS:
        if name in columns:
            data[name] = _numbers(name, columns[name])
    for name, values in columns.items():
        if name.startswith(LABEL):
            try:
                data[LABEL + name.removeprefix(LABEL).strip()] = np.array([LABEL_VALUES[v.strip()] for v in values])
            except KeyError:
                raise _NotClean from None
    return pa.RecordBatch.from_pydict(data)


def _numbers(name: str, values: Sequence[str]) -> NDArray[np.float64]:
    """A column of `NUMBERS`; spacing is above 0, a slope is not 0, a blank is NaN."""
    blank = np.array([not value.strip() for value in values])
    numbers = np.array([float(value) if value.strip() else np.nan for value in values])
    given = numbers[~blank]
    if not np.isfinite(given).all() or (name.startswith("spacing") and (given <= 0).any()):
        raise _NotClean
    if name == "slope" and (given == 0).any():
        raise _NotClean
    return numbers


def _is_clean(table: Any) -> bool:
    """Whether every check of the schema passes; faults are explained elsewhere."""
    import pyarrow.compute as pc

    if not table.num_rows:
        return False
    for name in ("study_id", "patient_id", "image_id", "image_path"):
        if not pc.min(pc.binary_length(table[name])).as_py():
            return False
    allowed = {"split": SPLITS, "polarity": ("", "inverted")}
    for name, values in allowed.items():
        if name in table.column_names and not set(pc.unique(table[name]).to_pylist()) <= set(values):
            return False
    if pc.count_distinct(table["image_id"]).as_py() != table.num_rows:
        return False
    if not (_are_given_together(table, ("slope", "intercept")) and _are_given_together(table, NUMBERS[2:])):
        return False
    study, patient, split = (_codes(table[name]) for name in ("study_id", "patient_id", "split"))
    return _has_one(study, patient) and _has_one(patient, split) and _are_clean_paths(table["image_path"])


def _codes(column: Any) -> NDArray[np.int64]:
    codes: NDArray[np.int64] = pd.factorize(text_series(column))[0].astype(np.int64)
    return codes


def _has_one(keys: NDArray[np.int64], values: NDArray[np.int64]) -> bool:
    """Whether all rows of a key have the same value."""
    last = np.zeros(int(keys.max()) + 1, dtype=np.int64)
    last[keys] = values
    return bool((last[keys] == values).all())


def _are_given_together(table: Any, names: Sequence[str]) -> bool:
    given = [~np.isnan(table[name].to_numpy()) for name in names if name in table.column_names]
    return not given or bool(np.isin(sum(column.astype(np.int64) for column in given), (0, len(names))).all())


def _are_clean_paths(paths: Any) -> bool:
    """As `path_fault`, which looks at the few paths that hold what a fault would."""
    import pyarrow.compute as pc

    suspect = pc.match_substring_regex(paths, r"^[/\\~.]|^[A-Za-z][A-Za-z0-9+.\-]*:|\.\.|\x00")
    return not any(path_fault(path) for path in paths.filter(suspect).to_pylist())


def text_series(column: Any) -> pd.Series[str]:
    """An Arrow column of text as a pandas column over the same memory."""
    text: Any = pd.StringDtype("pyarrow", na_value=np.nan)
    return pd.Series(text.__from_arrow__(column))


def frame_of(table: Any) -> pd.DataFrame:
    """The table as a frame, text over the same memory, with an integer `study_code` per study in order of appearance."""
    data: dict[str, Any] = {}
    for name in table.column_names:
        is_text = name in (*REQUIRED, *OPTIONAL, *PLACES)
        data[name] = text_series(table[name]) if is_text else table[name].to_numpy()
        if name == OPTIONAL[-1]:
            data["study_code"] = _codes(table["study_id"])
    return pd.DataFrame(data, copy=False)
