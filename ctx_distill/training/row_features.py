"""What a frozen tower makes of a manifest row never changes: it is computed when the row is first seen, and kept.

Rows are computed one at a time. In a batch the last bits of a feature depend on the others in it, and a run that was
resumed meets a row in other company than one that never stopped. So a row has the same bits whether it was kept in memory,
on disk, or is computed again because there was no room for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from ctx_distill.data.loading.cache import TensorCache
from ctx_distill.distributed import rank
from ctx_distill.errors import InputError
from ctx_distill.models.report_encoder import ReportEncoder
from ctx_distill.training.row_scratch import RowScratch, open_scratch

WORTH_A_LINE = 100_000_000
"""Bytes in memory from which on a cache prints what it holds."""
MEMORY_GB = 4.0
"""Gigabytes of features that one cache keeps in memory, per rank, where no setting says otherwise."""


@dataclass(frozen=True)
class CacheSettings:
    """Where the features of manifest rows are kept: in memory up to a limit, then on disk; the rest is computed again.

    The settings change speed, memory and disk space, never a result, so they are no part of a stage's request: a complete
    stage stays complete, and an interrupted one resumes, under other limits.

    Attributes:
        memory_gb: gigabytes in memory, per rank.
        disk_gb: gigabytes on disk, per machine: its ranks share one file. At most half of the free space is used. 0 uses no
            disk.
        folder: of that file; None takes the stage's folder. A local disk is faster than a shared file system.
    """

    memory_gb: float = MEMORY_GB
    disk_gb: float = 100.0
    folder: str | None = None

    def __post_init__(self) -> None:
        if min(self.memory_gb, self.disk_gb) < 0:
            raise InputError(
                f"cache: memory_gb is {self.memory_gb} and disk_gb {self.disk_gb}; expected 0 or more gigabytes."
            )


class RowFeatures:
    """Features that depend on a manifest row alone, bit for bit, kept within limits.

    Nothing is dropped for something newer: over a sweep of rows that do not fit, that would miss every time.

    Args:
        settings: the limits. The disk is used once `open_disk` was called.
    """

    def __init__(self, settings: CacheSettings = CacheSettings()) -> None:
        self.settings = settings
        self._memory = TensorCache(int(settings.memory_gb * 1e9))
        self._scratch: RowScratch | None = None
        self._row_bytes = 0
        self._unkept: set[int] = set()
        self._reported = False

    def open_disk(self, trainer: L.Trainer, rows: Sequence[int]) -> None:
        """Use the disk too; collective. The file is unlinked at once, and freed at `close` or when the process ends.

        Args:
            trainer: knows the ranks and the stage's folder.
            rows: the manifest rows that are seen again and again, which get the places on disk, in this order.
        """
        if self._scratch is None:
            folder = Path(self.settings.folder) if self.settings.folder is not None else None
            self._scratch = open_scratch(trainer, folder, self.settings.disk_gb, rows)

    def get(self, rows: Sequence[int], compute: Callable[[slice], Tensor]) -> Tensor:
        """Return the features (b, ...) of rows, on the CPU.

        Args:
            rows: b manifest rows, at least one.
            compute: gives the features (1, ...) of one place in `rows`, which it gets as a slice, so that what lies on a GPU is cut
                there; called for rows that are not kept.
        """
        finds = (partial(self._find, row, place, compute) for place, row in enumerate(rows))
        return torch.stack([self._memory.get(row, find) for row, find in zip(rows, finds, strict=True)])

    def _find(self, row: int, place: int, compute: Callable[[slice], Tensor]) -> Tensor:
        found = self._scratch.read(row) if self._scratch is not None else None
        if found is not None:
            return found
        # A copy of its own: a view would keep all that it is a view of in memory.
        made = compute(slice(place, place + 1))[0].to("cpu", copy=True).contiguous()
        self._row_bytes = made.nbytes
        if not self._memory.fits(made) and (self._scratch is None or not self._scratch.write(row, made)):
            self._unkept.add(row)
        return made

    def report_once(self, what: str) -> None:
        """Print what the cache holds, on rank zero, at the first call for which it has been used.

        Args:
            what: the stage and its features.
        """
        if self._row_bytes and not self._reported:
            self._reported = True
            if rank() == 0 and self._is_worth_a_line():
                print(f"{what}: {self.describe()}")

    def _is_worth_a_line(self) -> bool:
        on_disk = self._scratch is not None and self._scratch.stored_rows() > 0
        return on_disk or self._memory.held_bytes >= WORTH_A_LINE or bool(self._unkept)

    def describe(self) -> str:
        """Return what the cache holds, for the log."""
        on_disk = self._scratch.stored_rows() if self._scratch is not None else 0
        size = self._row_bytes
        return (
            f"{size:,} bytes per row; {len(self._memory):,} rows ({self._memory.held_bytes / 1e6:,.1f} MB) in this rank's"
            f" memory, {on_disk:,} ({on_disk * size / 1e6:,.1f} MB) on this machine's disk, {len(self._unkept):,} computed"
            " again whenever they are needed"
        )

    def close(self) -> None:
        """Free the disk space."""
        if self._scratch is not None:
            self._scratch.close()


class ReportFeatures:
    """Reports, or views of them, as one frozen encoder embeds them.

    Attributes:
        whole: what is kept: features of whole reports.

    Args:
        encoder: of the reports; no part of the stage's checkpoints.
        memory_gb: gigabytes of features of whole reports to keep in memory, 4 D_t bytes per row (2 KB at D_t = 512);
            further ones are computed again.
    """

    def __init__(self, encoder: ReportEncoder, memory_gb: float = MEMORY_GB) -> None:
        self.encoder = encoder
        self.whole = RowFeatures(CacheSettings(memory_gb=memory_gb, disk_gb=0))

    @torch.no_grad()
    def embed(self, rows: Tensor, reports: Sequence[str], views: Sequence[str]) -> Tensor:
        """(b, D_t), unit rows; zero where there is no text.

        Args:
            rows: (b,) manifest rows.
            reports: b whole reports.
            views: b texts to embed; one that is the whole report is embedded once.
        """
        self.encoder.to(rows.device)
        numbers = rows.tolist()
        whole = [place for place, view in enumerate(views) if view and view == reports[place]]
        cut = [place for place, view in enumerate(views) if view and view != reports[place]]
        features = torch.zeros(len(numbers), self.encoder.text_dim or 0, device=rows.device)

        def embed(places: Sequence[int]) -> Tensor:
            return self.encoder.encode_text([views[place] for place in places])

        def put(places: list[int], found: Tensor) -> None:
            features.index_copy_(0, torch.tensor(places, device=rows.device), found.to(features))

        if whole:
            put(whole, self.whole.get([numbers[place] for place in whole], lambda new: embed(whole[new])))
        if cut:
            put(cut, embed(cut))
        return features
