"""An index whose keys lie in parts over the ranks: queries are gathered, each rank searches its part, results merge."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ctx_distill.distributed import rank, world_size
from ctx_distill.retrieval.equal import EqualKeys
from ctx_distill.retrieval.exact import WIDE, exact_neighbours, merge
from ctx_distill.retrieval.index import (
    Device,
    XrayIndex,
    as_matrix,
    check_query,
    current_device,
    flat_on_gpu,
    gpu_of,
    gpu_wanted,
    knn,
    refuse_worker,
)


class ShardedIndex:
    """Exact nearest keys of a table that no rank holds whole.

    Every search is collective: each rank calls it equally often and in the same order, with as many queries as it has,
    none included. Collectives run in a process group of their own on the CPU (gloo), made at the first search, so that
    they never come between those of the gradients. The result is that of `XrayIndex` of kind `exact`, bit for bit, at
    any number of ranks. With one rank, or without a process group, the one part is the whole.

    Args:
        keys: (G, D) unit rows, memory-mapped: a rank reads its part of them, G / ranks rows, alone. All keys, or the
            distinct ones where `equal` is given.
        device: of the part, which is all that a GPU holds; see `XrayIndex`.
        equal: which positions share each key; None: each has its own.

    Raises:
        InputError: `device` is `gpu`, and FAISS sees none.
    """

    def __init__(self, keys: Tensor, device: Device = "auto", equal: EqualKeys | None = None) -> None:
        gpu_wanted(device)
        self._table, self._device, self._equal = keys, device, equal
        self._rank_device: torch.device | None = None
        self._owner: XrayIndex | None = None
        self._world: Any = None
        self._group: Any = None
        self._start = 0
        self._part_equal: EqualKeys | None = None
        self._part: NDArray[np.float32] = np.empty((0, keys.shape[1]), dtype=np.float32)
        self._on_gpu: Any = None

    @classmethod
    def of(cls, index: XrayIndex, device: Device = "auto") -> ShardedIndex:
        """The keys of an exact index, where they are, in parts over the ranks."""
        sharded = cls(torch.from_numpy(index.keys), device, index.equal)
        sharded._owner = index  # of the memory
        return sharded

    def __len__(self) -> int:
        return len(self._table) if self._equal is None else len(self._equal.order)

    @property
    def dimension(self) -> int:
        """Dimension of keys and queries."""
        return int(self._table.shape[1])

    def place(self, device: torch.device) -> None:
        """See `KeyIndex.place`; the part is taken at the first search, which all ranks make together."""
        self._rank_device = device

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest keys of each query of this rank, nearest first, ties by position; collective.

        Args:
            queries: (b, D) unit rows, any floating type and device; b may differ between ranks and be 0.
            k: neighbours, the same on every rank.

        Returns:
            Similarity (b, k) float32 and position (b, k) int64, on the queries' device.

        Raises:
            InputError: the dimension differs, or k is larger than the index; on every rank, whichever asked.
            RuntimeError: ranks ask for different k, or this is a DataLoader worker.
        """
        refuse_worker()
        own = as_matrix(queries)
        self._take_part()
        asked = self._gather(np.array([[len(own), own.shape[1], k]], dtype=np.int64))[:, 0]
        counts = asked[:, 0].tolist()
        if (asked[:, 2] != k).any():
            raise RuntimeError(
                f"ranks ask the sharded X-ray index for {asked[:, 2].tolist()} neighbours; expected one k"
            )
        for dimension in asked[:, 1].tolist():
            check_query(dimension, self.dimension, k, len(self))
        if not sum(counts):
            return queries.new_zeros((0, k), dtype=torch.float32), queries.new_zeros((0, k), dtype=torch.int64)
        padded = np.zeros((max(counts), self.dimension), dtype=np.float32)
        padded[: len(own)] = own
        queried = np.concatenate([part[:count] for part, count in zip(self._gather(padded), counts, strict=True)])
        similarity, position = self._search_part(queried, k)
        # One collective for both: a float32 is kept whole by a float64, whose bits travel as an integer.
        packed = np.stack([similarity.astype(np.float64).view(np.int64), position])
        first = sum(counts[: rank()])
        found = self._gather(packed)[:, :, first : first + len(own)].transpose(1, 2, 0, 3)
        found = found.reshape(2, len(own), world_size() * k)
        best, place = merge(found[0].view(np.float64).astype(np.float32), found[1], k)
        return torch.from_numpy(best).to(queries.device), torch.from_numpy(place).to(queries.device)

    def _take_part(self) -> None:
        """Open this rank's part and the process group, again where the ranks are no longer those of before."""
        world = dist.group.WORLD if world_size() > 1 else "alone"
        if self._world is world:
            return
        ranks = world_size()
        self._group = dist.new_group(backend="gloo") if ranks > 1 else None
        rows = len(self._table)
        start, end = rows * rank() // ranks, rows * (rank() + 1) // ranks
        self._part = self._table[start:end].numpy()
        self._start = start
        self._part_equal = None if self._equal is None else self._equal.part(start, end)
        gpu = gpu_of(self._device, self._rank_device or current_device())
        self._on_gpu = flat_on_gpu(self._part, gpu) if gpu is not None and len(self._part) else None
        self._world = world

    def _search_part(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(Q, k) of this rank's keys; where it has fewer than k, places that lose against any."""
        similarity = np.full((len(queries), k), -np.inf, dtype=np.float32)
        position = np.full((len(queries), k), len(self), dtype=np.int64)
        equal = self._part_equal
        within = min(k, len(self._part) if equal is None else len(equal.order))
        if within and len(queries):
            widths = () if self._on_gpu is None else (WIDE,)
            found = exact_neighbours(self._find, self._part, queries, within, equal, widths)
            similarity[:, :within], position[:, :within] = found[0], found[1] + (self._start if equal is None else 0)
        return similarity, position

    def _find(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if self._on_gpu is None or k > WIDE:
            return knn(queries, self._part, k)
        found: tuple[NDArray[np.float32], NDArray[np.int64]] = self._on_gpu.search(queries, k)
        return found

    def _gather(self, rows: NDArray[Any]) -> NDArray[Any]:
        """(ranks, ...) arrays of one shape, in rank order."""
        if self._group is None:
            return rows[None]
        own = torch.from_numpy(rows)
        parts = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(parts, own, group=self._group)
        return torch.stack(parts).numpy()
