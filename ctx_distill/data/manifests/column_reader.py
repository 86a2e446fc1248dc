"""Read a manifest's columns as Arrow arrays: in parts, checked by column, and memory-mapped from a cache if large.

Texts are not kept as Python objects: a million reports take 1 GB as Arrow strings and 4 GB as Python strings. Problems
are only detected here; `manifest.read_manifest` then reads the file row by row to report them.

The cache file is `FOLDER/NAME-PLACE-KEY.arrow` in Arrow's file format. `KEY` is a SHA-256 of the manifest's bytes and of
the code that reads it, so a new content or version gets a new file, and files of earlier contents are deleted. `PLACE` is
a hash of the manifest's path. Files are written under a temporary name and renamed, so several processes may write the
same one. FOLDER is `CTX_DISTILL_CACHE`, or `.ctx-distill-cache` next to the manifest, where the cached reports have the
same access rights. If the folder is not writable, nothing is cached.
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
"""Optional text: data set of the row, folder that its path is relative to, and `inverted` if low values are white."""
NUMBERS = ("slope", "intercept", "spacing_x", "spacing_y", "spacing_z")
"""Optional numbers that override a scan's header, see `ScanFile`."""
LABEL = "label:"

CACHE_VARIABLE = "CTX_DISTILL_CACHE"
SMALLEST_CACHED = 8 << 20
"""Min size in bytes of a cached manifest; smaller ones are read within a second."""
_CODE = ("column_reader.py", "tables.py")
_PART = 8192

# pandas writes a column of 1, 0 and blanks as "1.0", "0.0" and "".
LABEL_VALUES: Mapping[str, float] = {
    "": float("nan"), "1": 1.0, "0": 0.0, "-1": -1.0, "1.0": 1.0, "0.0": 0.0, "-1.0": -1.0, "-0": 0.0, "-0.0": 0.0,
}  # fmt: skip


_MAPPINGS: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


class _NotClean(Exception):
    """The file contains something that the row-by-row reader must handle."""


def cache_folder(manifest: Path) -> Path | None:
    """Return the cache folder of a manifest, or None if it is not writable."""
    configured = os.environ.get(CACHE_VARIABLE)
    folder = Path(configured) if configured else manifest.parent / ".ctx-distill-cache"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def cache_file(manifest: Path, key: str, kind: str) -> Path | None:
    """Return the path of a cache file, or None if nothing can be cached.

    Args:
        manifest: path of the manifest.
        key: `content_key` of the manifest.
        kind: suffix of the file name.
    """
    folder = cache_folder(manifest)
    return None if folder is None else folder / f"{_cache_stem(manifest)}-{key}.{kind}"


def _cache_stem(manifest: Path) -> str:
    return f"{manifest.stem}-{hash_json(str(manifest.resolve()))[:8]}"


def _delete_former(manifest: Path, key: str, folder: Path) -> None:
    """Delete cache files of earlier contents; processes that have them mapped keep their mapping."""
    for path in folder.glob(f"{glob.escape(_cache_stem(manifest))}-*"):
        if not path.name.startswith(f"{_cache_stem(manifest)}-{key}."):
            path.unlink(missing_ok=True)


def content_key(path: Path) -> str | None:
    """Return a key of a manifest's bytes and the code that reads them, or None if it is too small to be cached."""
    try:
        if path.stat().st_size < SMALLEST_CACHED:
            return None
        code = [hash_file(Path(__file__).with_name(name)) for name in _CODE]
        return hash_json([hash_file(path), *code])[:32]
    except OSError:
        return None


def read_columns(path: Path, key: str | None) -> Any | None:
    """Return the checked columns as a `pyarrow.Table`, or None if the row-by-row reader must report a problem.

    Args:
        path: a .csv or .parquet file.
        key: `content_key` of the file; None caches nothing.
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
            parts = list(batches)
            table = pa.Table.from_batches(parts) if parts else None
            return table if table is not None and _is_clean(table) else None
        table = _through_cache(batches, cached)
        if table is not None and key is not None:
            _delete_former(path, key, cached.parent)
        return table
    except (_NotClean, OSError, ValueError, csv.Error, pa.ArrowException):
        return None


def _through_cache(batches: Iterator[Any], cached: Path) -> Any | None:
    """Write the columns to a temporary file part by part, map and check them, then rename the file."""
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
        part.replace(cached)  # the mapping stays valid after renaming
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
    """Release the mapped columns from this process's memory; they are read from the file again when used.

    Call it when reading all text of a manifest once; otherwise the text would stay resident until memory is short.
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
            dtype = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            if pa.types.is_floating(dtype) and not field.name.startswith(LABEL):
                raise _NotClean
        used = [name for name in file.schema_arrow.names if _is_used(name)]
        for batch in file.iter_batches(batch_size=_PART, columns=used):
            yield _batch({n: [as_text(value) for value in batch.column(n).to_pylist()] for n in used}, batch.num_rows)


def _is_used(name: str) -> bool:
    return name in (*REQUIRED, *OPTIONAL, *PLACES, *NUMBERS) or name.startswith(LABEL)


def _check_header(header: Sequence[str]) -> None:
    findings = [name.removeprefix(LABEL).strip() for name in header if name.startswith(LABEL)]
    complete = set(REQUIRED) <= set(header) and len(set(header)) == len(header)
    if not complete or not all(findings) or len(set(findings)) < len(findings):
        raise _NotClean


def _batch(columns: Mapping[str, Sequence[str]], rows: int) -> Any:
    """Return the columns of the schema as a record batch: stripped text, and numbers and labels as floats."""
    import pyarrow as pa

    data: dict[str, Any] = {}
    for name in (*REQUIRED, *OPTIONAL, *(name for name in PLACES if name in columns)):
        values = columns.get("study_id" if name == "image_id" and name not in columns else name, [""] * rows)
        # Stripped, because "p1 " and "p1" would be two patients, one of whom could be in train and the other in test.
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
    """Return a column of `NUMBERS` with NaN for blank; spacings must be positive, and slopes not 0."""
    blank = np.array([not value.strip() for value in values])
    numbers = np.array([float(value) if value.strip() else np.nan for value in values])
    values_set = numbers[~blank]
    if not np.isfinite(values_set).all() or (name.startswith("spacing") and (values_set <= 0).any()):
        raise _NotClean
    if name == "slope" and (values_set == 0).any():
        raise _NotClean
    return numbers


def _is_clean(table: Any) -> bool:
    """Return whether every check of the schema passes."""
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
    if not (_are_set_together(table, ("slope", "intercept")) and _are_set_together(table, NUMBERS[2:])):
        return False
    study, patient, split = (_codes(table[name]) for name in ("study_id", "patient_id", "split"))
    return _has_one(study, patient) and _has_one(patient, split) and _are_clean_paths(table["image_path"])


def _codes(column: Any) -> NDArray[np.int64]:
    codes: NDArray[np.int64] = pd.factorize(text_series(column))[0].astype(np.int64)
    return codes


def _has_one(keys: NDArray[np.int64], values: NDArray[np.int64]) -> bool:
    """Return whether all rows of a key have the same value."""
    last = np.zeros(int(keys.max()) + 1, dtype=np.int64)
    last[keys] = values
    return bool((last[keys] == values).all())


def _are_set_together(table: Any, names: Sequence[str]) -> bool:
    present = [~np.isnan(table[name].to_numpy()) for name in names if name in table.column_names]
    return not present or bool(np.isin(sum(column.astype(np.int64) for column in present), (0, len(names))).all())


def _are_clean_paths(paths: Any) -> bool:
    """Return whether no path has a fault; calls `path_fault` only for suspicious paths."""
    import pyarrow.compute as pc

    suspect = pc.match_substring_regex(paths, r"^[/\\~.]|^[A-Za-z][A-Za-z0-9+.\-]*:|\.\.|\x00")
    return not any(path_fault(path) for path in paths.filter(suspect).to_pylist())


def text_series(column: Any) -> pd.Series[str]:
    """Return an Arrow text column as a pandas column that shares its memory."""
    text: Any = pd.StringDtype("pyarrow", na_value=np.nan)
    return pd.Series(text.__from_arrow__(column))


def frame_of(table: Any) -> pd.DataFrame:
    """Return the table as a frame that shares its text, with an integer `study_code` per study in order of appearance."""
    data: dict[str, Any] = {}
    for name in table.column_names:
        is_text = name in (*REQUIRED, *OPTIONAL, *PLACES)
        data[name] = text_series(table[name]) if is_text else table[name].to_numpy()
        if name == OPTIONAL[-1]:
            data["study_code"] = _codes(table["study_id"])
    return pd.DataFrame(data, copy=False)
