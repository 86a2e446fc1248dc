"""The FAISS index over the keys of the X-ray pool. This is the only module that imports faiss, and only inside functions.

faiss must be imported after torch: otherwise, a parallel search followed by a fork hangs the DataLoader workers. Importing
this module imports torch first. Only the training process may search; a search in a DataLoader worker raises an error.
"""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from ctx_distill.retrieval.equal import EQUAL_FILE, EqualKeys
from ctx_distill.retrieval.exact import WIDE, exact_neighbours
from ctx_distill.types import InputError

IndexKind = Literal["exact", "ivf", "hnsw"]
Device = Literal["auto", "cpu", "gpu"]
Placement = Literal["replicated", "sharded"]
INDEX_FILE = "index.faiss"
BLAS_FROM_BATCH = 2
"""Minimum number of queries for which flat search uses BLAS: 3.7 to 7 times faster at batches of 20 to 128."""


def installed_faiss() -> list[str]:
    """Return the sorted, normalised names of the installed distributions with a `faiss` module."""
    distributions = importlib.metadata.distributions()
    names = {(distribution.metadata["Name"] or "").lower().replace("_", "-") for distribution in distributions}
    return sorted(name for name in names if name in ("faiss", "faiss-cpu") or name.startswith("faiss-gpu"))


def refuse_two_faiss() -> None:
    """Check that exactly one faiss distribution is installed, because all install into the same `faiss/` folder.

    Raises:
        InputError: None or several are installed.
    """
    installed = installed_faiss()
    if not installed:
        raise InputError(
            'faiss is not installed; the X-ray index needs it. Run pip install "ctx-distill[cpu]", or on a machine with an '
            'NVIDIA GPU pip install "ctx-distill[gpu]".'
        )
    if len(installed) > 1:
        raise InputError(
            f"{' and '.join(installed)} are installed together and overwrite each other's files in faiss/; expected one. "
            f"Run pip uninstall -y {' '.join(installed)}, then reinstall ctx-distill[cpu] or ctx-distill[gpu]."
        )


def faiss_module() -> Any:
    """Return the faiss module.

    Raises:
        InputError: No or several faiss distributions are installed.
        RuntimeError: Called in a DataLoader worker.
    """
    refuse_worker()
    return _import_faiss()


def refuse_worker() -> None:
    """Check that this is not a DataLoader worker, where FAISS hangs or fails after a fork.

    Raises:
        RuntimeError: This is a DataLoader worker.
    """
    worker = get_worker_info()
    if worker is not None:
        raise RuntimeError(
            f"DataLoader worker {worker.id} of {worker.num_workers} searched the X-ray index; expected a search in the "
            "training process. Look up neighbours in the task's step, not in a dataset, transform or collate function."
        )


@functools.cache
def _import_faiss() -> Any:
    refuse_two_faiss()
    import faiss

    faiss.cvar.distance_compute_blas_threshold = BLAS_FROM_BATCH
    return faiss


def as_matrix(rows: Tensor | NDArray[np.floating]) -> NDArray[np.float32]:
    array = rows.detach().cpu().float().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
    if array.ndim != 2:
        raise ValueError(f"index got an array of shape {array.shape}; expected (rows, dimension)")
    return np.ascontiguousarray(array, dtype=np.float32)


class KeyIndex(Protocol):
    """Interface of an index of keys: `XrayIndex`, or `ShardedIndex` over the ranks."""

    def __len__(self) -> int:
        """Return the number of keys."""
        ...

    @property
    def dimension(self) -> int:
        """Dimension of keys and queries."""
        ...

    def place(self, device: torch.device) -> None:
        """Move the index to the rank's device; otherwise, the first search does."""
        ...

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return similarity (B, k) float32 and position (B, k) int64 of the k nearest keys of queries (B, D)."""
        ...


def check_query(dimension: int, expected: int, k: int, rows: int) -> None:
    """Check the arguments of a search.

    Raises:
        InputError: The dimension differs, or k is larger than the index.
    """
    if dimension != expected:
        raise InputError(
            f"queries have {dimension} dimensions, the X-ray index {expected}. "
            "Embed the reports with the expert that the index was built with, or rebuild the index."
        )
    if not 1 <= k <= rows:
        raise InputError(f"{k} neighbours requested from an index of {rows} X-rays; expected 1 to {rows}.")


class XrayIndex:
    """Search for the nearest keys by inner product, which is the cosine of unit rows.

    The index is opened on the CPU, and moved to a GPU by `place` or by the first search.

    Args:
        index: a FAISS index on the CPU, over all keys, or over the distinct ones if `equal` is set.
        kind: Exact, ivf or hnsw.
        device: Device of the search; `auto` uses the rank's GPU if FAISS supports it.
        recall: See below.
        equal: Positions that share each key of an exact index; None if all keys are distinct.

    Attributes:
        kind: Exact, ivf or hnsw.
        recall: Recall@1 against exact search, measured when an approximate index was built; otherwise None.

    Raises:
        InputError: `device` is `gpu`, but FAISS has no GPU.
    """

    def __init__(
        self,
        index: Any,
        kind: IndexKind,
        device: Device = "auto",
        recall: float | None = None,
        equal: EqualKeys | None = None,
    ) -> None:
        gpu_wanted(device)
        self._cpu, self._device = index, device
        self._placed: Any = None
        self.kind: IndexKind = kind
        self.recall = recall
        self.equal = equal

    def __len__(self) -> int:
        return int(self._cpu.ntotal) if self.equal is None else len(self.equal.order)

    def place(self, device: torch.device) -> None:
        """See `KeyIndex.place`. HNSW stays on the CPU, because FAISS has no GPU version."""
        gpu = None if self.kind == "hnsw" else gpu_of(self._device, device)
        self._placed = self._cpu if gpu is None else _on_gpu(self._cpu, gpu)

    @property
    def _index(self) -> Any:
        if self._placed is None:
            self.place(current_device())
        return self._placed

    @property
    def dimension(self) -> int:
        """Dimension of keys and queries."""
        return int(self._cpu.d)

    @property
    def on_gpu(self) -> bool:
        """Whether the search runs on a GPU."""
        return self._index is not self._cpu

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k nearest keys of each query, nearest first.

        Args:
            queries: (B, D) unit rows, of any floating type and on any device.
            k: Neighbours.

        Returns:
            Similarity (B, k) float32 and position (B, k) int64, on the queries' device; no entry is empty. Exact search
            breaks ties by position, and its result is independent of the batch.

        Raises:
            InputError: The dimension differs, or k is larger than the index.
            RuntimeError: Called in a DataLoader worker.
        """
        refuse_worker()
        array = as_matrix(queries)
        check_query(array.shape[1], self.dimension, k, len(self))
        if len(array) == 0:
            return queries.new_zeros((0, k), dtype=torch.float32), queries.new_zeros((0, k), dtype=torch.int64)
        if self.kind == "exact":
            similarity, position = exact_neighbours(self._find, self.keys, array, k, self.equal, self._widths)
        else:
            similarity, position = self._find(array, k)
            # Approximate indexes return empty entries (-1) if too few lists or links were visited; search these fully.
            short = np.flatnonzero((position < 0).any(axis=1))
            if len(short):
                similarity[short], position[short] = self._exhaustive(array[short], k)
        return torch.from_numpy(similarity).to(queries.device), torch.from_numpy(position).to(queries.device)

    def _find(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        neighbours: tuple[NDArray[np.float32], NDArray[np.int64]]
        neighbours = (self._cpu if k > WIDE else self._index).search(queries, k)
        return neighbours

    @property
    def _widths(self) -> tuple[int, ...]:
        # On the CPU, a search for so many candidates is slower than comparing with all keys.
        return (WIDE,) if self.on_gpu else ()

    @functools.cached_property
    def keys(self) -> NDArray[np.float32]:
        """The (distinct) keys of an exact index, without a copy."""
        rows = int(self._cpu.ntotal)
        flat = faiss_module().rev_swig_ptr(self._cpu.get_xb(), rows * self.dimension)
        keys: NDArray[np.float32] = flat.reshape(rows, self.dimension)
        return keys

    def _exhaustive(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if self.kind == "ivf":
            wide = faiss_module().SearchParametersIVF(nprobe=self._cpu.nlist)
            similarity, position = self._cpu.search(queries, k, params=wide)
        else:  # some keys cannot be reached in the HNSW graph, so compare with all keys
            keys = self._cpu.reconstruct_n(0, len(self))
            similarity, position = knn(queries, keys, k)
        return similarity, position

    def save(self, path: Path) -> None:
        """Write the index atomically, with its table of equal keys if it has one."""
        if self.equal is None:
            path.with_name(EQUAL_FILE).unlink(missing_ok=True)
        else:
            self.equal.save(path.with_name(EQUAL_FILE))
        part = path.with_name(f".{path.name}.part")
        faiss_module().write_index(self._cpu, str(part))
        part.replace(path)

    @classmethod
    def load(cls, path: Path, device: Device = "auto") -> XrayIndex:
        """Read an index and its table of equal keys, memory-mapped, so that ranks of one host share the pages.

        Raises:
            InputError: a file is missing or corrupt, or is of an unsupported index type.
        """
        faiss = faiss_module()
        if not path.is_file():
            raise InputError(f"{path}: no X-ray index. Run stage 1 (`ctx-distill index`) to build it.")
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except (RuntimeError, MemoryError) as error:
            reason = str(error).strip().splitlines()[-1][-120:]
            raise InputError(f"{path}: not a readable FAISS index ({reason}). Rerun stage 1.") from error
        kinds: dict[str, IndexKind] = {"IndexFlat": "exact", "IndexFlatIP": "exact", "IndexIVFFlat": "ivf"}
        kinds["IndexHNSWFlat"] = "hnsw"
        kind = kinds.get(type(index).__name__)
        if kind is None or index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise InputError(
                f"{path}: contains a {type(index).__name__}; expected a flat, IVF or HNSW index with inner product. "
                "Rerun stage 1."
            )
        table = path.with_name(EQUAL_FILE)
        equal = EqualKeys.load(table) if table.is_file() else None
        if equal is not None and len(equal) != index.ntotal:
            raise InputError(
                f"{table}: has {len(equal)} distinct keys, but {path.name} has {index.ntotal}; expected the same number. "
                "Rerun stage 1."
            )
        return cls(index, kind, device, equal=equal)


def knn(
    queries: NDArray[np.float32], keys: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return similarity and position (B, k) of the k nearest of keys (N, D), by brute force without an index."""
    faiss = faiss_module()
    neighbours: tuple[NDArray[np.float32], NDArray[np.int64]]
    neighbours = faiss.knn(queries, keys, k, metric=faiss.METRIC_INNER_PRODUCT)
    return neighbours


def gpu_wanted(device: Device) -> bool:
    """Return whether an index should be placed on this process's GPU.

    Raises:
        InputError: `device` is `gpu`, but FAISS has no GPU.
    """
    faiss = faiss_module()
    gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if device == "gpu" and gpus == 0:
        raise InputError(
            "the device of the X-ray index is gpu, but FAISS has no GPU. "
            'Install "ctx-distill[gpu]" on a machine with an NVIDIA driver, or set device to auto or cpu.'
        )
    return device != "cpu" and gpus > 0


def gpu_of(device: Device, rank_device: torch.device) -> int | None:
    """Return the number of the GPU for an index, or None for the CPU.

    Args:
        device: The setting.
        rank_device: Device of this rank.
    """
    if not gpu_wanted(device):
        return None
    if rank_device.type == "cuda":
        return torch.cuda.current_device() if rank_device.index is None else rank_device.index
    return 0 if device == "gpu" else None


def current_device() -> torch.device:
    """Return this process's current GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def flat_on_gpu(keys: NDArray[np.float32], gpu: int, chunk: int = 262_144) -> Any:
    """Build an exact index over keys (N, D) on a GPU, in parts, without a copy on the host."""
    faiss = faiss_module()
    config = faiss.GpuIndexFlatConfig()
    config.device = gpu
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), keys.shape[1], config)
    for start in range(0, len(keys), chunk):
        index.add(np.ascontiguousarray(keys[start : start + chunk]))
    return index


def _on_gpu(index: Any, gpu: int) -> Any:
    faiss = faiss_module()
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gpu, index)
