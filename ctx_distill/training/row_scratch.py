"""A temporary file that holds one tensor per manifest row, shared by the ranks of one machine.

The file has a fixed place for every row and is sparse, so it takes the disk space of the rows that were written. It is
unlinked as soon as all ranks have opened it: the operating system frees it when the last rank ends, however it ends.

Rows are read and written with `pread` and `pwrite` rather than through a memory map (`numpy.memmap`, `torch.from_file`):
a write to a mapped page on a full disk kills the process with SIGBUS, whereas `pwrite` raises an error that can be
handled, and mapped pages would count as this process's memory. The page cache serves repeated reads in either case.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctx_distill.distributed import barrier, gather_objects

PAGE = 4096
_PREFIX = "row-features-"


class RowScratch:
    """Store tensors of one shape and type by manifest row, within a limit; rows without a place are not stored.

    Every record has a checksum. A record that is missing, truncated or corrupt reads as absent, so the caller recomputes
    it: neither a full disk nor another rank that stops writing changes a result.

    Args:
        path: An existing file created by `create`.
        rows: The manifest rows that are assigned a place, in order of priority; the same on every rank.
        limit_bytes: Maximum size of the file; rows whose place is beyond it are not stored.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, rows: Sequence[int], limit_bytes: int) -> None:
        self.path = path
        self.limit_bytes = limit_bytes
        self._slot = {row: slot for slot, row in enumerate(rows)}
        self._data = _header_bytes(len(rows))
        self._like: Tensor | None = None
        self._file = path.open("r+b", buffering=0)

    @staticmethod
    def create(path: Path, rows: int) -> None:
        """Create an empty file with places for `rows` rows.

        Raises:
            OSError: The file cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(_header_bytes(rows)))

    def read(self, row: int) -> Tensor | None:
        """Return the row's tensor on the CPU, bit-identical to what was written, or None if there is none."""
        place = self._place(row)
        if place is None or self._like is None:
            return None
        expected = os.pread(self._file.fileno(), 8, place[0])
        if len(expected) < 8 or not any(expected):
            return None
        tensor = torch.empty_like(self._like)
        buffer = _bytes(tensor)
        at = 0
        while at < len(buffer):
            count = os.preadv(self._file.fileno(), [buffer[at:]], place[1] + at)
            if not count:
                return None
            at += count
        return tensor if _checksum(tensor) == expected else None

    def write(self, row: int, tensor: Tensor) -> bool:
        """Store a row's tensor if there is room; return whether it was stored.

        On an error (full disk, quota), the file is truncated to free its space, and closed with a warning.

        Args:
            row: Manifest row.
            tensor: Contiguous tensor on the CPU; not stored if shape or type differ from the first call.
        """
        if self._like is None:
            self._like = torch.empty_like(tensor)
        if tensor.shape != self._like.shape or tensor.dtype != self._like.dtype:
            return False
        place = self._place(row)
        if place is None:
            return False
        content = _bytes(tensor)
        try:
            if not os.fstat(self._file.fileno()).st_size:  # emptied by another rank on this machine
                self.close()
                return False
            at = 0
            while at < len(content):
                at += os.pwrite(self._file.fileno(), content[at:], place[1] + at)
            os.pwrite(self._file.fileno(), _checksum(tensor), place[0])
        except OSError as error:
            warnings.warn(
                f"{self.path}: {error.strerror or error}. Features are no longer cached on disk and are recomputed; the"
                " result is the same. Free space, or set cache.folder to another disk.",
                stacklevel=2,
            )
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), 0)
            self.close()
            return False
        return True

    def stored_rows(self) -> int:
        """Return the number of rows in the file, of all ranks of this machine."""
        if self._file.closed:
            return 0
        header = np.frombuffer(os.pread(self._file.fileno(), 8 * len(self._slot), 0), dtype=np.int64)
        return int(np.count_nonzero(header))

    def close(self) -> None:
        """Close the file; later reads and writes do nothing."""
        self._file.close()

    def _place(self, row: int) -> tuple[int, int] | None:
        """Return the offsets of the row's checksum and tensor, or None if the row has no place."""
        slot = self._slot.get(row)
        if slot is None or self._file.closed or self._like is None:
            return None
        size = self._like.nbytes
        return None if self._data + (slot + 1) * size > self.limit_bytes else (8 * slot, self._data + slot * size)


def open_scratch(trainer: L.Trainer, folder: Path | None, disk_gb: float, rows: Sequence[int]) -> RowScratch | None:
    """Open one file for all ranks of this machine (collective).

    Args:
        trainer: Provides the machines; its `default_root_dir` is the stage's folder.
        folder: Folder of the file; None uses the stage's folder.
        disk_gb: Maximum size in gigabytes, at most half of the free space; 0 opens no file.
        rows: See `RowScratch`.

    Returns:
        The file, or None, with a warning, if it cannot be created.
    """
    if disk_gb <= 0 or not rows:
        return None
    stage_folder = Path(trainer.default_root_dir)
    token = gather_objects([uuid.uuid4().hex])[0]
    path = (folder or stage_folder) / f"{_PREFIX}{token}-{trainer.node_rank}"
    first_on_machine = trainer.local_rank == 0
    scratch = None
    try:
        if first_on_machine:
            if folder is None:
                # Remove files of a process that was killed while it opened one.
                for leftover in stage_folder.glob(f"{_PREFIX}*-{trainer.node_rank}"):
                    leftover.unlink(missing_ok=True)
            RowScratch.create(path, len(rows))
    except OSError as error:
        _warn(path, error)
    barrier()
    try:
        free = shutil.disk_usage(path.parent).free
        scratch = RowScratch(path, rows, min(int(disk_gb * 1e9), free // 2))
    except OSError as error:
        _warn(path, error)
    barrier()
    if first_on_machine:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return scratch


def _warn(path: Path, error: OSError) -> None:
    warnings.warn(
        f"{path}: {error.strerror or error}. Features that do not fit in memory are recomputed; the result is the same."
        " Set cache.folder to a writable folder, or cache.disk_gb=0.",
        stacklevel=3,
    )


def _header_bytes(rows: int) -> int:
    """Return the size of the header: a checksum of 8 bytes per row, rounded up to pages."""
    return -(-8 * rows // PAGE) * PAGE


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without a copy."""
    array: NDArray[np.uint8] = tensor.flatten().view(torch.uint8).numpy()
    return array.data


def _checksum(tensor: Tensor) -> bytes:
    """Return a checksum of 8 bytes, never all zero: the sum of the tensor's words, which detects lost pages."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = int(tensor.flatten().view(words).sum(dtype=torch.int64))
    return (total & 0x7FFF_FFFF_FFFF_FFFF | 1 << 63).to_bytes(8, "little")
