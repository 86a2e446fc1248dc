"""The order of an epoch: determined by seed and epoch, split among ranks, optionally mixed from groups by shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler
from torch.utils.data.distributed import DistributedSampler

from ctx_distill.data.manifests.manifest import LABEL, Manifest
from ctx_distill.distributed import rank, world_size
from ctx_distill.errors import InputError

_SEED_STEP = 100_003


class EpochShuffle(DistributedSampler[int]):
    """A shuffle that depends only on seed and epoch, so that a resumed run sees the same order.

    Each rank takes every n-th item of the same shuffle. The remainder is dropped from the epoch, so that no item is read
    twice and all ranks take equally many steps. Like `EpochBatches`, it is a `DistributedSampler`, so that Lightning does
    not wrap it in one that repeats items as padding.

    Args:
        size: number of items.
        seed: seed of the run.
        groups: (size,) int64, the group of each item, or None.
        shares: share of an epoch per group; they sum to 1.
    """

    def __init__(
        self, size: int, seed: int, groups: NDArray[np.int64] | None = None, shares: Mapping[int, float] | None = None
    ) -> None:
        Sampler.__init__(self)
        self.size, self.seed, self.epoch = size, seed, 0
        self.groups, self.shares = groups, dict(shares or {})
        self.taken = self._taken()
        self.length = sum(self.taken.values()) if self.taken else size

    def _taken(self) -> dict[int, int]:
        """Return the items per epoch of each group: as many as the smallest group allows for the shares."""
        if self.groups is None:
            return {}
        counts = {group: int((self.groups == group).sum()) for group in self.shares}
        epoch = min(counts[group] / share for group, share in self.shares.items() if share > 0)
        return {group: min(counts[group], int(epoch * share + 1e-9)) for group, share in self.shares.items()}

    def __len__(self) -> int:
        return self.length // world_size()

    def whole(self) -> NDArray[np.int64]:
        """Return the epoch's items (length,) in order, for all ranks."""
        generator = torch.Generator().manual_seed(self.seed * _SEED_STEP + self.epoch)
        order: NDArray[np.int64] = torch.randperm(self.size, generator=generator).numpy()
        if self.groups is None:
            return order
        chosen = [order[self.groups[order] == group][:count] for group, count in self.taken.items()]
        return order[np.isin(order, np.concatenate(chosen))]

    def __iter__(self) -> Iterator[int]:
        order, ranks = self.whole(), world_size()
        yield from order[rank() : len(order) // ranks * ranks : ranks].tolist()


@dataclass(frozen=True)
class EpochPart:
    """The rest of an epoch, as positions in its global order.

    Attributes:
        epoch: epoch number.
        start: first position that has not been used.
        end: position after the last one used in this epoch.
        batches: number of global batches for the rest.
        ranks: world size for which this was computed.
    """

    epoch: int
    start: int
    end: int
    batches: int
    ranks: int

    def after(self, batches: int) -> EpochPart:
        """Return the rest after this many global batches."""
        start, left = self.start, self.batches
        for _ in range(batches):
            start, left = start + -(-(self.end - start) // left), left - 1
        return replace(self, start=start, batches=left)

    def among(self, ranks: int, batch_size: int, max_batches: int) -> EpochPart:
        """Return the same rows for another number of ranks.

        The rows are spread evenly, so that every rank has rows in every batch. Batches are at most `batch_size`, unless
        there would be more of them than in a full epoch, or a rank would get no row.

        Args:
            ranks: the new number of ranks.
            batch_size: usual batch size per rank.
            max_batches: batches of a full epoch.
        """
        if ranks == self.ranks:
            return self
        rows = self.end - self.start
        batches = min(-(-rows // (batch_size * ranks)), rows // ranks, max_batches)
        return replace(self, batches=max(batches, min(rows, 1)), ranks=ranks)


class EpochBatches(DistributedSampler[list[int]]):
    """This rank's batches of an `EpochShuffle`, for a loader with `batch_size=None`.

    The order is cut into global batches, and each rank takes every n-th item of each. An incomplete last batch is
    dropped, unless it is the only one. A resumed epoch follows its `EpochPart`.

    Args:
        items: order of the items.
        batch_size: batch size per rank.
    """

    def __init__(self, items: EpochShuffle, batch_size: int) -> None:
        Sampler.__init__(self)
        self.items, self.batch_size, self.epoch = items, batch_size, items.epoch
        self._resumed: EpochPart | None = None

    def __len__(self) -> int:
        return max(len(self.items) // self.batch_size, min(len(self.items), 1))

    def set_epoch(self, epoch: int) -> None:
        """Use this epoch from now on."""
        self.epoch = epoch
        self.items.set_epoch(epoch)

    def part(self, epoch: int) -> EpochPart:
        """Return the part of an epoch to use: all of it, or the rest that an interrupted run left."""
        if self._resumed is not None and self._resumed.epoch == epoch:
            return self._resumed
        rows = len(self) * min(self.batch_size, len(self.items)) * world_size()
        return EpochPart(epoch, 0, rows, len(self), world_size())

    def resume(self, part: EpochPart) -> None:
        """Use the rest of an epoch that an interrupted run left, with any number of ranks.

        An epoch of which nothing was used is started afresh.
        """
        anew = part.start == 0 and part.ranks != world_size()
        self._resumed = None if anew else part.among(world_size(), self.batch_size, len(self))
        self.set_epoch(part.epoch)  # workers prefetch before Lightning sets the epoch

    def __iter__(self) -> Iterator[list[int]]:
        part, order = self.part(self.epoch), self.items.whole()
        while part.batches:
            rest = part.after(1)
            rows = order[part.start : rest.start].tolist()
            local_rows = rows[rank() :: world_size()]
            yield local_rows or rows[-1:]  # fewer rows than ranks: the last row is repeated
            part = rest


class InOrder(DistributedSampler[int]):
    """Items in order, split among ranks as in `EpochShuffle`.

    All ranks get equally many items, so that they meet in every gather; the last item is repeated as padding. Repeats
    occur within one global batch, where `distributed.first_rows` removes them.

    Args:
        size: number of items.
    """

    def __init__(self, size: int) -> None:
        Sampler.__init__(self)
        self.size, self.epoch = size, 0

    def __len__(self) -> int:
        return -(-self.size // world_size())

    def __iter__(self) -> Iterator[int]:
        for place in range(len(self)):
            yield min(place * world_size() + rank(), self.size - 1)


@dataclass(frozen=True)
class Mixing:
    """The share of each data set or class in a training epoch.

    An epoch is as long as the smallest group allows without reading a scan twice; the other groups are sampled anew in
    each epoch.

    Attributes:
        by: `source`, the manifest column; or, for tasks that see labels, `label:<finding>` or `label:any`, whose groups
            are `1` and `0` (uncertain and blank count as 0).
        shares: share per group, summing to 1; other groups are excluded.
    """

    by: str = "source"
    shares: Mapping[str, float] = field(default_factory=dict)

    def groups(self, rows: Manifest, with_labels: bool) -> tuple[NDArray[np.int64], dict[int, float]]:
        """Return the group of each row, (N,) int64 with -1 for none, and the shares per group.

        Raises:
            InputError: shares that do not sum to 1, a group without rows, or labels that the task must not see.
        """
        if abs(sum(self.shares.values()) - 1) > 1e-6 or min(self.shares.values(), default=-1.0) < 0:
            raise InputError(f"mixing.shares is {dict(self.shares)}; expected non-negative shares that sum to 1")
        of_row = self._group_of_rows(rows, with_labels)
        names = list(self.shares)
        for name in names:
            if self.shares[name] > 0 and not (of_row == name).any():
                known = ", ".join(sorted(set(of_row.tolist())))
                raise InputError(
                    f"{rows.path}: no training row has {self.by} {name!r}, which mixing.shares names; choose from: {known}"
                )
        numbers = np.full(len(of_row), -1, dtype=np.int64)
        for number, name in enumerate(names):
            numbers[of_row == name] = number
        return numbers, {number: self.shares[name] for number, name in enumerate(names)}

    def _group_of_rows(self, rows: Manifest, with_labels: bool) -> NDArray[np.str_]:
        if self.by == "source":
            if not rows.has_column("source"):
                raise InputError(f"{rows.path}: mixing by source needs column source in the manifest; add it")
            sources: NDArray[np.str_] = np.array(rows.column("source").tolist(), dtype=str)
            return sources
        finding = self.by.removeprefix(LABEL)
        if not self.by.startswith(LABEL) or (finding != "any" and finding not in rows.finding_names):
            raise InputError(f"mixing.by is {self.by!r}; expected source, label:any or label:<finding> of {rows.path}")
        if not with_labels:
            raise InputError(
                f"mixing.by is {self.by!r}, but this stage must not see labels; mix by source, or in the classifier"
            )
        labels = rows.labels() if finding == "any" else rows.labels()[:, [rows.finding_names.index(finding)]]
        classes: NDArray[np.str_] = (labels == 1).any(axis=1).astype(int).astype(str)
        return classes
