"""Manifests: the one table that says which image belongs to which patient, split, report and labels.

The schema is written down for users in `data_manifests/README.md`.
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
    """A manifest that has passed every check, or some of its rows.

    Rows are numbered from 0 in the whole manifest, and keep their number in a split. Parts share the columns of the whole:
    `rows`, `column`, `report`, `study_codes` and so on copy no text, `frame` of a part does.

    Attributes:
        path: the file it came from; image paths are relative to its folder.
        finding_names: the findings of the label columns, in the manifest's order; may be empty.
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
        """Take rows that have passed every check.

        Args:
            path: see the class.
            frame: of the whole manifest, see `Manifest.frame`.
            finding_names: see the class.
            places: (N,) rows of `frame` that this part holds, in order; None holds all.
            key: `content_key` of the file; None where it is too small to cache for.
        """
        self.path, self.finding_names = path, finding_names
        self._whole, self._places, self._key = frame, places, key

    def __len__(self) -> int:
        return len(self._whole) if self._places is None else len(self._places)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row per image; the index holds its number in the whole manifest. For a part this copies the reports.

        Columns `study_id, patient_id, split, image_path, findings, impression, image_id, view, language` are text ("" for
        blank), `study_code` is an integer per study, `label:<finding>` are 1, 0, -1 (uncertain) or NaN (blank). Of `PLACES`
        (text) and `NUMBERS` (NaN for blank) those that the file has.
        """
        return self._whole if self._places is None else self._whole.iloc[self._places]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the rows held here; the same wherever the file lies and however it is stored."""
        if self._key is None or self._places is not None:
            return _fingerprint(self)
        return _kept_fingerprint(self, self._key)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """(N,) int64, the rows' numbers in the whole manifest."""
        index: NDArray[np.int64] = self._whole.index.to_numpy(dtype=np.int64)
        return index if self._places is None else index[self._places]

    def column(self, name: str) -> pd.Series[Any]:
        """One column of `frame`."""
        column = self._whole[name]
        return column if self._places is None else column.iloc[self._places]

    def has_column(self, name: str) -> bool:
        """Whether `frame` has a column of this name."""
        return name in self._whole.columns

    def split(self, *names: str) -> Manifest:
        """The rows of these splits, under their original row numbers; may be empty.

        Raises:
            InputError: a name other than train, val, test.
        """
        unknown = [name for name in names if name not in SPLITS]
        if unknown or not names:
            raise InputError(f"{self.path}: no split {unknown or 'given'}; expected one or more of {', '.join(SPLITS)}")
        return self.where(self.column("split").isin(names).to_numpy(dtype=bool))

    def where(self, keep: NDArray[np.bool_]) -> Manifest:
        """The rows where `keep` (N,) is true, under their original row numbers."""
        chosen = np.flatnonzero(np.asarray(keep, dtype=bool))
        places = chosen if self._places is None else self._places[chosen]
        return Manifest(self.path, self._whole, self.finding_names, places=places, key=self._key)

    @property
    def key(self) -> str | None:
        """A key of these rows' content for what is computed from them; None where the manifest is too small to cache for.

        It depends on the file's bytes, so that the reports need not be hashed again.
        """
        if self._key is None:
            return None
        return hash_json(
            [self._key, None if self._places is None else hashlib.sha256(self._places.tobytes()).hexdigest()]
        )[:32]

    def image_file(self, row: int) -> Path:
        """The image of a row; `row` is a value of `rows`, so the same for the whole and a split."""
        root = str(self._whole.at[row, "root"]) if "root" in self._whole.columns else ""
        return self.path.parent / root / str(self._whole.at[row, "image_path"])

    def image_id(self, row: int) -> str:
        """The image's id of a row."""
        return str(self._whole.at[row, "image_id"])

    def scan_file(self, row: int) -> ScanFile:
        """The same with the slope, intercept and spacing that the manifest gives for it."""
        root = str(self._whole.at[row, "root"]) if "root" in self._whole.columns else ""
        url = f"{root.rstrip('/')}/{self._whole.at[row, 'image_path']!s}" if REMOTE in root else None
        given = {name: float(str(self._whole.at[row, name])) for name in NUMBERS if name in self._whole.columns}
        slope, intercept, *spacing = (given.get(name, math.nan) for name in NUMBERS)
        return ScanFile(
            self.image_file(row),
            None if math.isnan(slope) else slope,
            None if math.isnan(intercept) else intercept,
            None if math.isnan(sum(spacing)) else (spacing[0], spacing[1], spacing[2]),
            url,
        )

    @property
    def synthetic(self) -> bool:
        """Whether it is of the embedded phantom cohort, which leaves a `cohort.json` beside its manifests."""
        return (self.path.parent / "cohort.json").is_file()

    def inverted(self, row: int) -> bool:
        """Whether a radiograph is stored with low values white."""
        return "polarity" in self._whole.columns and str(self._whole.at[row, "polarity"]) == "inverted"

    def report(self, row: int) -> str:
        """Findings and impression of a row in one string, white space made single; "" where there is no text."""
        return _joined(str(self._whole.at[row, "findings"]), str(self._whole.at[row, "impression"]))

    def reports(self) -> ReportTexts:
        """`report` of every row, in the order of `rows`; no text is held as a Python string."""
        return ReportTexts(self)

    def has_report(self) -> NDArray[np.bool_]:
        """(N,) bool: whether `report` is not empty. Reads no text: a manifest's are stripped, so a blank one has no length."""
        import pyarrow as pa
        import pyarrow.compute as pc

        told = np.zeros(len(self._whole), dtype=bool)
        for name in ("findings", "impression"):
            texts = pa.chunked_array([pa.array([], pa.large_string()), *_chunks(self._whole[name])])
            told |= pc.greater(pc.binary_length(texts), 0).to_numpy()
        return told if self._places is None else told[self._places]

    def labels(self) -> NDArray[np.float32]:
        """(N, F) float32 in the order of the rows and of `finding_names`: 1, 0, -1 (uncertain) or NaN (blank)."""
        labels = np.empty((len(self), len(self.finding_names)), dtype=np.float32)
        for number, name in enumerate(self.finding_names):
            labels[:, number] = self.column(LABEL + name).to_numpy(dtype=np.float32)
        return labels

    def study_codes(self) -> NDArray[np.int64]:
        """(N,) int64 in the order of the rows: equal numbers are images of one study, also across splits."""
        return self.column("study_code").to_numpy(dtype=np.int64)


class ReportTexts(Sequence[str]):
    """The reports of a manifest's rows, made when they are asked for.

    Args:
        manifest: whose.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._sections = [manifest._whole[name] for name in ("findings", "impression")]
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
    """Texts of a column at places; where these lie close together, cut out of the piece that holds them."""
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
    """A column of text as Arrow arrays; no copy where it is one already."""
    import pyarrow as pa

    array = pa.array(column.array, type=pa.large_string())
    return list(array.chunks) if isinstance(array, pa.ChunkedArray) else [array]


def read_manifest(path: Path, *, check_images: bool = True) -> Manifest:
    """Reads and checks a manifest.

    The columns of a large one are cached, see `manifest_table`; so is that its images have all been opened once, after
    which only their names are looked for.

    Args:
        path: a .csv (UTF-8) or .parquet file.
        check_images: also look on the disk: every image exists, opens, and lies in the manifest's folder after
            following links. Images are not decoded.

    Raises:
        InputError: everything the schema refuses, up to ten faults in one message with their total.
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
    """Open every image, or look for its name where a run of before has opened it."""
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
        read_by_rows(path, check_images=True)  # says where
        raise InputError(f"{path}: its images changed while they were checked; run it again")
    if marker is not None:
        write_text(marker, where)


def _kept_fingerprint(manifest: Manifest, key: str) -> str:
    """The fingerprint of a whole cached manifest, which is hashed once."""
    kept = cache_file(manifest.path, key, "fingerprint")
    if kept is not None and kept.is_file() and len(found := kept.read_text()) == 64:
        return found
    fingerprint = _fingerprint(manifest)
    if kept is not None:
        write_text(kept, fingerprint)
    return fingerprint


def _fingerprint(manifest: Manifest) -> str:
    import pyarrow as pa
    import pyarrow.compute as pc

    digest = hashlib.sha256(b"ctx-distill manifest 1")
    for name in (*REQUIRED, *OPTIONAL):
        chunks = _chunks(manifest.column(name))
        # Lengths go in too, or moving a word from one cell to the next would not show.
        for chunk in chunks:
            digest.update(pc.utf8_length(chunk).to_numpy(zero_copy_only=False).astype("<i8", copy=False))
            release_pages()
        for chunk in chunks:
            release_pages()
            offsets = np.frombuffer(chunk.buffers()[1], dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            if len(chunk) and chunk.buffers()[2] is not None:
                digest.update(pa.py_buffer(chunk.buffers()[2])[offsets[0] : offsets[-1]])
    # Only where they say something, so that manifests without them keep the fingerprint they have always had.
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
