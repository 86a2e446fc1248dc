"""Cache the features of a frozen tower by manifest row.

Rows are computed one at a time. In a batch, the last bits of a feature depend on the batch, and a resumed run may batch
rows differently. Computed alone, a row's features are bit-identical whether they come from memory, from disk, or are
recomputed.
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
"""Size in memory, in bytes, from which a cache prints its contents."""
MEMORY_GB = 4.0
"""Default memory of a cache, in gigabytes per rank."""


@dataclass(frozen=True)
class CacheSettings:
    """Limits of a feature cache: memory first, then disk; features that do not fit are recomputed.

    The settings change speed, memory and disk space, but no result. They are therefore not part of a stage's request: a
    stage remains complete, or resumes, under other limits.

    Attributes:
        memory_gb: Gigabytes in memory, per rank.
        disk_gb: Gigabytes on disk, per machine, whose ranks share one file. At most half of the free space is used; 0
            disables the disk.
        folder: Folder of that file; None uses the stage's folder. A local disk is faster than a shared file system.

    Raises:
        InputError: a limit is negative.
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
    """A bounded cache of features that depend on the manifest row only.

    Entries are never evicted: repeated sweeps over more rows than fit would miss every time.

    Args:
        settings: The limits. The disk is used once `open_disk` has been called.
    """

    def __init__(self, settings: CacheSettings = CacheSettings()) -> None:
        self.settings = settings
        self._memory = TensorCache(int(settings.memory_gb * 1e9))
        self._scratch: RowScratch | None = None
        self._row_bytes = 0
        self._unkept: set[int] = set()
        self._reported = False

    def open_disk(self, trainer: L.Trainer, rows: Sequence[int]) -> None:
        """Also use the disk (collective). The file is unlinked at once, and freed on `close` or at the process's end.

        Args:
            trainer: Provides the ranks and the stage's folder.
            rows: The manifest rows that are used repeatedly; they are assigned places on disk in this order.
        """
        if self._scratch is None:
            folder = Path(self.settings.folder) if self.settings.folder is not None else None
            self._scratch = open_scratch(trainer, folder, self.settings.disk_gb, rows)

    def get(self, rows: Sequence[int], compute: Callable[[slice], Tensor]) -> Tensor:
        """Return the features (b, ...) of rows, on the CPU.

        Args:
            rows: b manifest rows, at least one.
            compute: Returns the features (1, ...) of one position in `rows`, which is passed as a slice so that tensors on
                a GPU are sliced there; called for rows that are not cached.
        """
        loads = (partial(self._load, row, place, compute) for place, row in enumerate(rows))
        return torch.stack([self._memory.get(row, load) for row, load in zip(rows, loads, strict=True)])

    def _load(self, row: int, place: int, compute: Callable[[slice], Tensor]) -> Tensor:
        stored = self._scratch.read(row) if self._scratch is not None else None
        if stored is not None:
            return stored
        # A copy, because a view would keep its base in memory.
        computed = compute(slice(place, place + 1))[0].to("cpu", copy=True).contiguous()
        self._row_bytes = computed.nbytes
        if not self._memory.fits(computed) and (self._scratch is None or not self._scratch.write(row, computed)):
            self._unkept.add(row)
        return computed

    def report_once(self, what: str) -> None:
        """Print the contents of the cache once, on rank zero, after it has been used.

        Args:
            what: Name of the stage and of the features.
        """
        if self._row_bytes and not self._reported:
            self._reported = True
            if rank() == 0 and self._is_worth_a_line():
                print(f"{what}: {self.describe()}")

    def _is_worth_a_line(self) -> bool:
        on_disk = self._scratch is not None and self._scratch.stored_rows() > 0
        return on_disk or self._memory.held_bytes >= WORTH_A_LINE or bool(self._unkept)

    def describe(self) -> str:
        """Return a description of the contents, for the log."""
        on_disk = self._scratch.stored_rows() if self._scratch is not None else 0
        size = self._row_bytes
        return (
            f"{size:,} bytes per row; {len(self._memory):,} rows ({self._memory.held_bytes / 1e6:,.1f} MB) in this rank's"
            f" memory, {on_disk:,} ({on_disk * size / 1e6:,.1f} MB) on this machine's disk, {len(self._unkept):,}"
            " recomputed on each use"
        )

    def close(self) -> None:
        """Free the disk space."""
        if self._scratch is not None:
            self._scratch.close()


class ReportFeatures:
    """Embed reports, or views of them, with a frozen encoder.

    Attributes:
        whole: The cache of complete reports' features.

    Args:
        encoder: Encoder of the reports; not part of the stage's checkpoints.
        memory_gb: Size of the cache in gigabytes, at 4 D_t bytes per row (2 KB at D_t = 512). Features that do not fit are
            recomputed.
    """

    def __init__(self, encoder: ReportEncoder, memory_gb: float = MEMORY_GB) -> None:
        self.encoder = encoder
        self.whole = RowFeatures(CacheSettings(memory_gb=memory_gb, disk_gb=0))

    @torch.no_grad()
    def embed(self, rows: Tensor, reports: Sequence[str], views: Sequence[str]) -> Tensor:
        """Return the features (b, D_t), unit rows; zero for empty texts.

        Args:
            rows: (b,) manifest rows.
            reports: b complete reports.
            views: b texts to embed; features of complete reports are cached.
        """
        self.encoder.to(rows.device)
        numbers = rows.tolist()
        complete = [place for place, view in enumerate(views) if view and view == reports[place]]
        partial_views = [place for place, view in enumerate(views) if view and view != reports[place]]
        features = torch.zeros(len(numbers), self.encoder.text_dim or 0, device=rows.device)

        def embed(places: Sequence[int]) -> Tensor:
            return self.encoder.encode_text([views[place] for place in places])

        def put(places: list[int], values: Tensor) -> None:
            features.index_copy_(0, torch.tensor(places, device=rows.device), values.to(features))

        if complete:
            put(complete, self.whole.get([numbers[place] for place in complete], lambda new: embed(complete[new])))
        if partial_views:
            put(partial_views, embed(partial_views))
        return features
