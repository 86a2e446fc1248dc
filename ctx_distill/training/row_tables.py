"""Tables with one row per training row, computed once per stage, in memory up to a limit and then memory-mapped."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

PART = 4096
"""Rows computed at once."""


class RowTables:
    """Allocate tables within a common memory limit.

    A table beyond the limit is a memory-mapped file, whose pages the operating system can evict. The file has no name, so
    it is freed with the table or with the process. Its space is allocated in advance, so that a full disk fails early.

    Attributes:
        held_bytes: Bytes of tables in memory.
        mapped_bytes: Bytes of tables in files.
    """

    def __init__(self, memory_gb: float, folder: Path | None = None) -> None:
        """Set the limit.

        Args:
            memory_gb: Gigabytes of tables in memory, per rank.
            folder: Folder of the mapped files; None keeps all tables in memory.
        """
        self.limit_bytes, self.folder = memory_gb * 1e9, folder
        self.held_bytes = self.mapped_bytes = 0

    def collect(self, rows: int, parts: Iterable[Tensor]) -> Tensor:
        """Concatenate parts (n, ...) into a table (rows, ...) on the CPU.

        Args:
            rows: Total number of rows.
            parts: At least one part, all of the same type.

        Raises:
            ValueError: The parts have another total number of rows.
        """
        table, at = None, 0
        for part in parts:
            if table is None:
                table = self._empty((rows, *part.shape[1:]), part.dtype)
            table[at : at + len(part)] = part.cpu()
            at += len(part)
        if table is None or at != rows:
            raise ValueError(f"the parts have {at} rows; expected {rows}")
        return table

    def describe(self) -> str:
        """Return the sizes of the tables, for the log."""
        return (
            f"{self.held_bytes / 1e6:,.1f} MB in this rank's memory, {self.mapped_bytes / 1e6:,.1f} MB in mapped files"
        )

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        size = count * dtype.itemsize
        if self.folder is not None and size and self.held_bytes + size > self.limit_bytes:
            try:
                with tempfile.TemporaryFile(dir=self.folder) as file:
                    os.posix_fallocate(file.fileno(), 0, size)
                    table = torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=count, dtype=dtype)
            except OSError as error:
                warnings.warn(
                    f"{self.folder}: {error.strerror or error}. A table of {size / 1e9:.1f} GB is kept in memory instead,"
                    f" beyond the limit of {self.limit_bytes / 1e9:g} GB (cache_gb).",
                    stacklevel=3,
                )
            else:
                self.mapped_bytes += size
                return table.view(shape)
        self.held_bytes += size
        return torch.empty(shape, dtype=dtype)
