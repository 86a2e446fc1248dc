"""An index whose keys are sharded over the ranks: gather the queries, search each shard, and merge the results."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ctx_distill.distributed import host_group, rank, world_size
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
    """Exact search over keys that are sharded over the ranks.

    Every search is collective: all ranks must call it equally often and in the same order, with any number of queries,
    including 0. Collectives run on the CPU, in the group of `distributed.host_group`, so that they do not interleave with
    those of the gradients. The result is bit-identical to `XrayIndex` of kind `exact` for any number of ranks.

    Args:
        keys: (G, D) unit rows, memory-mapped; a rank reads only its G / ranks rows. All keys, or the distinct ones if
            `equal` is set.
        device: Device of the shard; see `XrayIndex`.
        equal: Positions that share each key; None if all keys are distinct.

    Raises:
        InputError: `device` is `gpu`, but FAISS has no GPU.
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
        """Shard the keys of an exact index over the ranks, without a copy."""
        sharded = cls(torch.from_numpy(index.keys), device, index.equal)
        sharded._owner = index  # keeps the memory of the keys alive
        return sharded

    def __len__(self) -> int:
        return len(self._table) if self._equal is None else len(self._equal.order)

    @property
    def dimension(self) -> int:
        """Dimension of keys and queries."""
        return int(self._table.shape[1])

    def place(self, device: torch.device) -> None:
        """See `KeyIndex.place`; the shard is opened by the first search, which is collective."""
        self._rank_device = device

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k nearest keys of this rank's queries, nearest first, ties in order of position (collective).

        Args:
            queries: (b, D) unit rows, of any floating type and on any device; b may differ between ranks and be 0.
            k: Neighbours, the same on every rank.

        Returns:
            Similarity (b, k) float32 and position (b, k) int64, on the queries' device.

        Raises:
            InputError: The dimension differs, or k is larger than the index, on any rank.
            RuntimeError: k differs between ranks, or this is a DataLoader worker.
        """
        refuse_worker()
        local = as_matrix(queries)
        self._open_shard()
        requests = self._gather(np.array([[len(local), local.shape[1], k]], dtype=np.int64))[:, 0]
        counts = requests[:, 0].tolist()
        if (requests[:, 2] != k).any():
            raise RuntimeError(
                f"ranks request {requests[:, 2].tolist()} neighbours from the sharded X-ray index; expected the same k"
            )
        for dimension in requests[:, 1].tolist():
            check_query(dimension, self.dimension, k, len(self))
        if not sum(counts):
            return queries.new_zeros((0, k), dtype=torch.float32), queries.new_zeros((0, k), dtype=torch.int64)
        padded = np.zeros((max(counts), self.dimension), dtype=np.float32)
        padded[: len(local)] = local
        queried = np.concatenate([part[:count] for part, count in zip(self._gather(padded), counts, strict=True)])
        similarity, position = self._search_part(queried, k)
        # One collective for both: the similarity, exact in float64, is sent as the bits of an integer.
        packed = np.stack([similarity.astype(np.float64).view(np.int64), position])
        first = sum(counts[: rank()])
        results = self._gather(packed)[:, :, first : first + len(local)].transpose(1, 2, 0, 3)
        results = results.reshape(2, len(local), world_size() * k)
        best, place = merge(results[0].view(np.float64).astype(np.float32), results[1], k)
        return torch.from_numpy(best).to(queries.device), torch.from_numpy(place).to(queries.device)

    def _open_shard(self) -> None:
        """Open this rank's shard and the process group, again if the process group has changed."""
        world = dist.group.WORLD if world_size() > 1 else "alone"
        if self._world is world:
            return
        ranks = world_size()
        self._group = host_group() if ranks > 1 else None
        rows = len(self._table)
        start, end = rows * rank() // ranks, rows * (rank() + 1) // ranks
        self._part = self._table[start:end].numpy()
        self._start = start
        self._part_equal = None if self._equal is None else self._equal.part(start, end)
        gpu = gpu_of(self._device, self._rank_device or current_device())
        self._on_gpu = flat_on_gpu(self._part, gpu) if gpu is not None and len(self._part) else None
        self._world = world

    def _search_part(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the neighbours (Q, k) among this rank's keys, padded with entries of similarity -inf."""
        similarity = np.full((len(queries), k), -np.inf, dtype=np.float32)
        position = np.full((len(queries), k), len(self), dtype=np.int64)
        equal = self._part_equal
        within = min(k, len(self._part) if equal is None else len(equal.order))
        if within and len(queries):
            widths = () if self._on_gpu is None else (WIDE,)
            nearest = exact_neighbours(self._find, self._part, queries, within, equal, widths)
            similarity[:, :within] = nearest[0]
            position[:, :within] = nearest[1] + (self._start if equal is None else 0)
        return similarity, position

    def _find(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if self._on_gpu is None or k > WIDE:
            return knn(queries, self._part, k)
        neighbours: tuple[NDArray[np.float32], NDArray[np.int64]] = self._on_gpu.search(queries, k)
        return neighbours

    def _gather(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Gather arrays of one shape, (ranks, ...), in rank order."""
        if self._group is None:
            return rows[None]
        local = torch.from_numpy(rows)
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local, group=self._group)
        return torch.stack(parts).numpy()
