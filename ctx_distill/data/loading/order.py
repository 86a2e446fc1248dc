"""The order of an epoch: a function of seed and epoch alone, parted among ranks, drawn from sources or classes by shares."""

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
    """A shuffle that is a function of seed and epoch alone, so that a resumed run sees the order it would have seen.

    Each rank takes every n-th item of the same shuffle; what does not go into n equal parts is left out of that epoch, so
    that no item is read twice and all ranks take as many steps. It is a `DistributedSampler`, as `EpochBatches` is, so that
    Lightning does not wrap it in one of its own, which repeats items to fill up.

    Args:
        size: number of items.
        seed: of the run.
        groups: (size,) int64, the group of each item, or None.
        shares: of an epoch, by group; they add up to 1.
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
        """Items an epoch of each group: as many as the scarcest group allows under the shares."""
        if self.groups is None:
            return {}
        counts = {group: int((self.groups == group).sum()) for group in self.shares}
        epoch = min(counts[group] / share for group, share in self.shares.items() if share > 0)
        return {group: min(counts[group], int(epoch * share + 1e-9)) for group, share in self.shares.items()}

    def __len__(self) -> int:
        return self.length // world_size()

    def whole(self) -> NDArray[np.int64]:
        """(length,) the epoch's items in order, of all ranks together."""
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
    """What is left of an epoch, as positions in its order of all ranks together.

    Attributes:
        epoch: which.
        start: first position that has not been seen.
        end: position after the last one that is seen in this epoch.
        batches: global batches in which the rest is seen.
        ranks: world size that this is meant for.
    """

    epoch: int
    start: int
    end: int
    batches: int
    ranks: int

    def after(self, batches: int) -> EpochPart:
        """What is left after so many global batches."""
        start, left = self.start, self.batches
        for _ in range(batches):
            start, left = start + -(-(self.end - start) // left), left - 1
        return replace(self, start=start, batches=left)

    def among(self, ranks: int, batch_size: int, most: int) -> EpochPart:
        """The same rows for another number of ranks.

        They are spread evenly, so that every rank has rows in every batch. Batches are not larger than usual, unless
        there would be more of them than in a whole epoch, or the rest would leave a rank without a row.

        Args:
            ranks: the other number.
            batch_size: usual rows of a batch, per rank.
            most: batches of a whole epoch.
        """
        if ranks == self.ranks:
            return self
        rows = self.end - self.start
        batches = min(-(-rows // (batch_size * ranks)), rows // ranks, most)
        return replace(self, batches=max(batches, min(rows, 1)), ranks=ranks)


class EpochBatches(DistributedSampler[list[int]]):
    """This rank's batches of an `EpochShuffle`, for a loader with `batch_size=None`.

    The order is cut into global batches, and each rank takes every n-th item of each. The last batch of an epoch is
    dropped where it is not full, unless there is no other. A resumed epoch is what its `EpochPart` says.

    Args:
        items: the order.
        batch_size: rows of a batch, per rank.
    """

    def __init__(self, items: EpochShuffle, batch_size: int) -> None:
        Sampler.__init__(self)
        self.items, self.batch_size, self.epoch = items, batch_size, items.epoch
        self._resumed: EpochPart | None = None

    def __len__(self) -> int:
        return max(len(self.items) // self.batch_size, min(len(self.items), 1))

    def set_epoch(self, epoch: int) -> None:
        """Read this epoch from now on."""
        self.epoch = epoch
        self.items.set_epoch(epoch)

    def part(self, epoch: int) -> EpochPart:
        """What this process reads of an epoch: all of it, or what a stopped run has left of it."""
        if self._resumed is not None and self._resumed.epoch == epoch:
            return self._resumed
        rows = len(self) * min(self.batch_size, len(self.items)) * world_size()
        return EpochPart(epoch, 0, rows, len(self), world_size())

    def resume(self, part: EpochPart) -> None:
        """Read what a stopped run, of any number of ranks, has left of an epoch.

        An epoch of which nothing was seen is read as if it had begun here.
        """
        anew = part.start == 0 and part.ranks != world_size()
        self._resumed = None if anew else part.among(world_size(), self.batch_size, len(self))
        self.set_epoch(part.epoch)  # workers read ahead before Lightning says which epoch it is

    def __iter__(self) -> Iterator[list[int]]:
        part, order = self.part(self.epoch), self.items.whole()
        while part.batches:
            rest = part.after(1)
            rows = order[part.start : rest.start].tolist()
            own = rows[rank() :: world_size()]
            yield own or rows[-1:]  # fewer rows are left than there are ranks: the last one is seen more than once
            part = rest


class InOrder(DistributedSampler[int]):
    """Items one after the other, parted among ranks as `EpochShuffle` parts them.

    All ranks take as many, so that they meet in every gather: where the items do not go into equal parts the last one is
    repeated. It then comes twice in one global batch, never in two, and `distributed.first_rows` finds it there.

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
    """What share of a training epoch each data set, or each class, has.

    An epoch is then as long as the scarcest group allows without reading a scan twice; of the others each epoch draws afresh.

    Attributes:
        by: `source`, the manifest's column of that name; or `label:<finding>` or `label:any`, for tasks that see labels, whose
            groups are `1` and `0` (uncertain and blank count as 0).
        shares: group to share, adding up to 1; groups that are not named are left out.
    """

    by: str = "source"
    shares: Mapping[str, float] = field(default_factory=dict)

    def groups(self, rows: Manifest, with_labels: bool) -> tuple[NDArray[np.int64], dict[int, float]]:
        """(N,) int64 group of each row, -1 for none, and the shares by group.

        Raises:
            InputError: shares that do not add up to 1, a group without rows, labels that the task must not see.
        """
        if abs(sum(self.shares.values()) - 1) > 1e-6 or min(self.shares.values(), default=-1.0) < 0:
            raise InputError(f"mixing.shares are {dict(self.shares)}; expected shares from 0 that add up to 1")
        of_row = self._group_of_rows(rows, with_labels)
        names = list(self.shares)
        for name in names:
            if self.shares[name] > 0 and not (of_row == name).any():
                known = ", ".join(sorted(set(of_row.tolist())))
                raise InputError(
                    f"{rows.path}: mixing by {self.by} names {name!r}, and no training row has it; found {known}"
                )
        numbers = np.full(len(of_row), -1, dtype=np.int64)
        for number, name in enumerate(names):
            numbers[of_row == name] = number
        return numbers, {number: self.shares[name] for number, name in enumerate(names)}

    def _group_of_rows(self, rows: Manifest, with_labels: bool) -> NDArray[np.str_]:
        if self.by == "source":
            if not rows.has_column("source"):
                raise InputError(f"{rows.path}: mixing by source, and the manifest has no column source; add one")
            sources: NDArray[np.str_] = np.array(rows.column("source").tolist(), dtype=str)
            return sources
        finding = self.by.removeprefix(LABEL)
        if not self.by.startswith(LABEL) or (finding != "any" and finding not in rows.finding_names):
            raise InputError(f"mixing.by is {self.by!r}; expected source, label:any or label:<finding> of {rows.path}")
        if not with_labels:
            raise InputError(
                f"mixing by {self.by}: this stage must not see labels; mix by source, or in the classifier"
            )
        labels = rows.labels() if finding == "any" else rows.labels()[:, [rows.finding_names.index(finding)]]
        classes: NDArray[np.str_] = (labels == 1).any(axis=1).astype(int).astype(str)
        return classes
