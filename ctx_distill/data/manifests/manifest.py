"""Manifests: tables that assign a patient, split, report and labels to each image.

The schema is documented in `data_manifests/README.md`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ctx_distill.data.io.remote import REMOTE
from ctx_distill.data.io.scan_file import ScanFile
from ctx_distill.data.manifests.column_reader import (
    LABEL,
    NUMBERS,
    OPTIONAL,
    PLACES,
    REQUIRED,
    SPLITS,
    cache_file,
    content_key,
    frame_of,
    read_columns,
    release_pages,
)
from ctx_distill.data.manifests.image_paths import all_listed, faults_by_place
from ctx_distill.data.manifests.row_reader import read_by_rows
from ctx_distill.errors import InputError
from ctx_distill.files import hash_json, write_text

__all__ = ["LABEL", "NUMBERS", "OPTIONAL", "PLACES", "REQUIRED", "SPLITS", "Manifest", "ReportTexts", "read_manifest"]


class Manifest:
    """A validated manifest, or a subset of its rows.

    Rows are numbered from 0 in the full manifest and keep their number in subsets. Subsets share the columns of the full
    manifest: only `frame` copies text; `rows`, `column`, `report`, `study_codes` and so on do not.

    Attributes:
        path: manifest file; image paths are relative to its folder.
        finding_names: findings of the label columns, in the manifest's order; may be empty.
    """

    def __init__(
        self,
        path: Path,
        frame: pd.DataFrame,
        finding_names: tuple[str, ...],
        *,
        places: NDArray[np.int64] | None = None,
        key: str | None = None,
    ) -> None:
        """Wrap validated rows.

        Args:
            path: see the class.
            frame: rows of the full manifest, see `Manifest.frame`.
            finding_names: see the class.
            places: (N,) positions in `frame` of this subset, in order; None selects all rows.
            key: `content_key` of the file, or None if it is too small to be cached.
        """
        self.path, self.finding_names = path, finding_names
        self._full_frame, self._places, self._key = frame, places, key

    def __len__(self) -> int:
        return len(self._full_frame) if self._places is None else len(self._places)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The rows as a frame, indexed by their number in the full manifest; copies the reports of a subset.

        There is one row per image. Columns `study_id, patient_id, split, image_path, findings, impression, image_id, view, language` are text ("" for
        blank), `study_code` is an integer per study, `label:<finding>` are 1, 0, -1 (uncertain) or NaN (blank). Columns
        of `PLACES` (text) and `NUMBERS` (NaN for blank) are present if the file has them.
        """
        return self._full_frame if self._places is None else self._full_frame.iloc[self._places]

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 (hex) of these rows, independent of the file's location and format."""
        if self._key is None or self._places is not None:
            return _fingerprint(self)
        return _cached_fingerprint(self, self._key)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """The row numbers in the full manifest, (N,) int64."""
        index: NDArray[np.int64] = self._full_frame.index.to_numpy(dtype=np.int64)
        return index if self._places is None else index[self._places]

    def column(self, name: str) -> pd.Series[Any]:
        """Return one column of `frame`."""
        column = self._full_frame[name]
        return column if self._places is None else column.iloc[self._places]

    def has_column(self, name: str) -> bool:
        """Return whether `frame` has a column of this name."""
        return name in self._full_frame.columns

    def split(self, *names: str) -> Manifest:
        """Return the rows of these splits with their original row numbers; may be empty.

        Raises:
            InputError: a name other than train, val or test.
        """
        unknown = [name for name in names if name not in SPLITS]
        if unknown or not names:
            raise InputError(f"{self.path}: unknown or missing split {unknown}; choose from: {', '.join(SPLITS)}")
        return self.where(self.column("split").isin(names).to_numpy(dtype=bool))

    def where(self, keep: NDArray[np.bool_]) -> Manifest:
        """Return the rows where `keep` (N,) is true, with their original row numbers."""
        chosen = np.flatnonzero(np.asarray(keep, dtype=bool))
        places = chosen if self._places is None else self._places[chosen]
        return Manifest(self.path, self._full_frame, self.finding_names, places=places, key=self._key)

    @property
    def key(self) -> str | None:
        """The cache key of results computed from these rows, or None if the manifest is too small to be cached.

        It is derived from the file's bytes, so that the reports need not be hashed again.
        """
        if self._key is None:
            return None
        return hash_json(
            [self._key, None if self._places is None else hashlib.sha256(self._places.tobytes()).hexdigest()]
        )[:32]

    def image_file(self, row: int) -> Path:
        """Return the image path of a row; `row` is a value of `rows`."""
        root = str(self._full_frame.at[row, "root"]) if "root" in self._full_frame.columns else ""
        return self.path.parent / root / str(self._full_frame.at[row, "image_path"])

    def image_id(self, row: int) -> str:
        """Return the image id of a row."""
        return str(self._full_frame.at[row, "image_id"])

    def scan_file(self, row: int) -> ScanFile:
        """Return the scan of a row with the slope, intercept and spacing from the manifest."""
        root = str(self._full_frame.at[row, "root"]) if "root" in self._full_frame.columns else ""
        url = f"{root.rstrip('/')}/{self._full_frame.at[row, 'image_path']!s}" if REMOTE in root else None
        overrides = {
            name: float(str(self._full_frame.at[row, name])) for name in NUMBERS if name in self._full_frame.columns
        }
        slope, intercept, *spacing = (overrides.get(name, math.nan) for name in NUMBERS)
        return ScanFile(
            self.image_file(row),
            None if math.isnan(slope) else slope,
            None if math.isnan(intercept) else intercept,
            None if math.isnan(sum(spacing)) else (spacing[0], spacing[1], spacing[2]),
            url,
        )

    @property
    def synthetic(self) -> bool:
        """Whether this is a manifest of the phantom cohort, which has a `cohort.json` in the same folder."""
        return (self.path.parent / "cohort.json").is_file()

    def inverted(self, row: int) -> bool:
        """Return whether low values of a stored radiograph are white."""
        return "polarity" in self._full_frame.columns and str(self._full_frame.at[row, "polarity"]) == "inverted"

    def report(self, row: int) -> str:
        """Return findings and impression of a row as one string with single spaces; "" without text."""
        return _joined(str(self._full_frame.at[row, "findings"]), str(self._full_frame.at[row, "impression"]))

    def reports(self) -> ReportTexts:
        """Return `report` of every row in the order of `rows`, as a lazy sequence."""
        return ReportTexts(self)

    def has_report(self) -> NDArray[np.bool_]:
        """Return whether each report is not empty, (N,) bool; compares lengths only, because texts are stripped."""
        import pyarrow as pa
        import pyarrow.compute as pc

        has_text = np.zeros(len(self._full_frame), dtype=bool)
        for name in ("findings", "impression"):
            texts = pa.chunked_array([pa.array([], pa.large_string()), *_chunks(self._full_frame[name])])
            has_text |= pc.greater(pc.binary_length(texts), 0).to_numpy()
        return has_text if self._places is None else has_text[self._places]

    def labels(self) -> NDArray[np.float32]:
        """Return the labels (N, F) float32 by row and finding: 1, 0, -1 (uncertain) or NaN (blank)."""
        labels = np.empty((len(self), len(self.finding_names)), dtype=np.float32)
        for number, name in enumerate(self.finding_names):
            labels[:, number] = self.column(LABEL + name).to_numpy(dtype=np.float32)
        return labels

    def study_codes(self) -> NDArray[np.int64]:
        """Return study codes (N,) int64 by row; images of one study have equal codes, also across splits."""
        return self.column("study_code").to_numpy(dtype=np.int64)


class ReportTexts(Sequence[str]):
    """The reports of a manifest's rows, created on access.

    Args:
        manifest: rows whose reports are accessed.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._sections = [manifest._full_frame[name] for name in ("findings", "impression")]
        self._places = np.arange(len(manifest)) if manifest._places is None else manifest._places
        self._manifest = manifest

    @property
    def manifest(self) -> Manifest:
        """The rows."""
        return self._manifest

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            sections = [_texts_at(section, self._places[place]) for section in self._sections]
            release_pages()
            return [_joined(findings, impression) for findings, impression in zip(*sections, strict=True)]
        findings, impression = (section.iloc[self._places[place]] for section in self._sections)
        return _joined(str(findings), str(impression))

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _PART):
            yield from self[start : start + _PART]


_PART = 4096


def _texts_at(column: pd.Series[Any], places: NDArray[np.int64]) -> list[str]:
    """Return the texts of a column at places, sliced from one block if the places are close together."""
    if not len(places):
        return []
    first, last = int(places.min()), int(places.max())
    if last - first > 4 * len(places):
        return list(column.iloc[places])
    piece = column.iloc[first : last + 1].tolist()
    return [piece[place] for place in (places - first).tolist()]


def _joined(findings: str, impression: str) -> str:
    return " ".join(f"{findings} {impression}".split())


def _chunks(column: pd.Series[Any]) -> list[Any]:
    """Return a text column as Arrow arrays, without a copy if it is stored in Arrow."""
    import pyarrow as pa

    array = pa.array(column.array, type=pa.large_string())
    return list(array.chunks) if isinstance(array, pa.ChunkedArray) else [array]


def read_manifest(path: Path, *, check_images: bool = True) -> Manifest:
    """Read and check a manifest.

    The columns of a large manifest are cached, see `column_reader`. Once all its images have been opened successfully,
    later calls only check that the files exist.

    Args:
        path: a .csv (UTF-8) or .parquet file.
        check_images: also check that every image exists, can be opened, and is in the manifest's folder after resolving
            links. Images are not decoded.

    Raises:
        InputError: violations of the schema; one message lists up to ten and their total.
    """
    path = Path(path)
    key = content_key(path)
    table = read_columns(path, key)
    if table is None:
        return Manifest(path, *read_by_rows(path, check_images))
    frame = frame_of(table)
    names = tuple(name.removeprefix(LABEL) for name in table.column_names if name.startswith(LABEL))
    if check_images:
        _check_all_images(path, frame, key)
    return Manifest(path, frame, names, key=key)


def _check_all_images(path: Path, frame: pd.DataFrame, key: str | None) -> None:
    """Open every image, or only check that it exists if an earlier run has opened it."""
    roots = frame["root"].tolist() if "root" in frame.columns else [""] * len(frame)
    paths = frame["image_path"].tolist()
    marker = None if key is None else cache_file(path, key, "opened")
    where = str(path.parent.resolve())
    if (
        marker is not None
        and marker.is_file()
        and marker.read_text() == where
        and all_listed(path.parent, roots, paths)
    ):
        return
    faults, no_folders = faults_by_place(path.parent, roots, paths)
    if faults or no_folders:
        read_by_rows(path, check_images=True)  # raises with row numbers
        raise InputError(f"{path}: images changed during the check; run the command again")
    if marker is not None:
        write_text(marker, where)


def _cached_fingerprint(manifest: Manifest, key: str) -> str:
    """Return the fingerprint of a full cached manifest, which is computed once."""
    cached = cache_file(manifest.path, key, "fingerprint")
    if cached is not None and cached.is_file() and len(text := cached.read_text()) == 64:
        return text
    fingerprint = _fingerprint(manifest)
    if cached is not None:
        write_text(cached, fingerprint)
    return fingerprint


def _fingerprint(manifest: Manifest) -> str:
    import pyarrow as pa
    import pyarrow.compute as pc

    digest = hashlib.sha256(b"ctx-distill manifest 1")
    for name in (*REQUIRED, *OPTIONAL):
        chunks = _chunks(manifest.column(name))
        # Hash the lengths as well, so that moving a word from one cell to the next changes the hash.
        for chunk in chunks:
            digest.update(pc.utf8_length(chunk).to_numpy(zero_copy_only=False).astype("<i8", copy=False))
            release_pages()
        for chunk in chunks:
            release_pages()
            offsets = np.frombuffer(chunk.buffers()[1], dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            if len(chunk) and chunk.buffers()[2] is not None:
                digest.update(pa.py_buffer(chunk.buffers()[2])[offsets[0] : offsets[-1]])
    # Only if not blank, so that manifests without these columns keep their fingerprint.
    for name in ("source", "polarity"):
        if manifest.has_column(name) and (manifest.column(name) != "").any():
            digest.update(f"|{name}|{manifest.column(name).tolist()!r}".encode())
    for name in NUMBERS:
        if manifest.has_column(name) and manifest.column(name).notna().any():
            digest.update(f"|{name}|".encode() + manifest.column(name).to_numpy(dtype="<f8").tobytes())
    for name in manifest.finding_names:
        encoded = np.nan_to_num(manifest.column(LABEL + name).to_numpy(dtype=np.float64), nan=-9.0).astype("<f4")
        digest.update(f"|{len(name)}:{name}|".encode())
        digest.update(encoded.tobytes())
    return digest.hexdigest()
