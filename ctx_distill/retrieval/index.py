"""The FAISS index over the keys of the X-ray pool. The only module that imports faiss, and only inside functions.

faiss after torch, always: imported before torch, a parallel search followed by a fork hangs the forked DataLoader
workers. Importing this module imports torch first. DataLoader workers never search: lookups belong to the training
process, and a worker that asks is refused.
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
"""Flat search goes through BLAS from this many queries on: 3.7 to 7 times faster at batches of 20 to 128."""


def installed_faiss() -> list[str]:
    """Names of the installed distributions that hold a `faiss` module, normalised, sorted."""
    found = importlib.metadata.distributions()
    names = {(distribution.metadata["Name"] or "").lower().replace("_", "-") for distribution in found}
    return sorted(name for name in names if name in ("faiss", "faiss-cpu") or name.startswith("faiss-gpu"))


def refuse_two_faiss() -> None:
    """Check that exactly one faiss distribution is installed; all install into one `faiss/` folder.

    Raises:
        InputError: none, or several.
    """
    found = installed_faiss()
    if not found:
        raise InputError(
            'faiss is not installed; the X-ray index needs one of its wheels. Run pip install "ctx-distill[cpu]" on a '
            'machine without an NVIDIA GPU, or pip install "ctx-distill[gpu]" on one with it.'
        )
    if len(found) > 1:
        raise InputError(
            f"{' and '.join(found)} are installed together and overwrite each other's files in faiss/; expected one. "
            f"Run pip uninstall -y {' '.join(found)}, then install ctx-distill[cpu] or ctx-distill[gpu] again."
        )


def faiss_module() -> Any:
    """The faiss module.

    Raises:
        InputError: none or several are installed.
        RuntimeError: asked for in a DataLoader worker.
    """
    refuse_worker()
    return _import_faiss()


def refuse_worker() -> None:
    """Lookups belong to the training process: FAISS in a forked DataLoader worker hangs or fails.

    Raises:
        RuntimeError: this is a DataLoader worker.
    """
    worker = get_worker_info()
    if worker is not None:
        raise RuntimeError(
            f"DataLoader worker {worker.id} of {worker.num_workers} asked the X-ray index; expected the training process "
            "alone to ask it. Look neighbours up in the task's step, not in a dataset, transform or collate function."
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
    """What answers for the nearest keys: `XrayIndex`, or `ShardedIndex` over the ranks."""

    def __len__(self) -> int:
        """Number of keys."""
        ...

    @property
    def dimension(self) -> int:
        """Dimension of keys and queries."""
        ...

    def place(self, device: torch.device) -> None:
        """Open the index where a rank computes: on that GPU, or on the CPU; without it, the first search opens it."""
        ...

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Similarity (B, k) float32 and position (B, k) int64 of the k nearest keys of queries (B, D)."""
        ...


def check_query(dimension: int, expected: int, k: int, rows: int) -> None:
    """Check what an index is asked.

    Raises:
        InputError: the dimension differs, or k is larger than the index.
    """
    if dimension != expected:
        raise InputError(
            f"queries have {dimension} dimensions, the X-ray index {expected}. "
            "Embed the reports with the expert that the index was built with, or build the index again."
        )
    if not 1 <= k <= rows:
        raise InputError(f"{k} neighbours asked of an index of {rows} X-rays. Ask for 1 to {rows}.")


class XrayIndex:
    """Nearest keys by inner product (cosine, as keys and queries are unit rows).

    It opens on the CPU, and goes to a GPU when `place` names it or, without, at the first search.

    Args:
        index: of FAISS, on the CPU: over all keys, or over the distinct ones where `equal` is given.
        kind: exact, ivf or hnsw.
        device: where searches run: `auto` is the rank's GPU where it has one and FAISS sees it.
        recall: see below.
        equal: which positions share each key of an exact index; None: each has its own.

    Attributes:
        kind: exact, ivf or hnsw.
        recall: recall@1 against the exact index, measured when an approximate index was built; None otherwise.

    Raises:
        InputError: `device` is `gpu`, and FAISS sees none.
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
        """See `KeyIndex.place`. HNSW stays on the CPU: FAISS has no GPU form of it."""
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
        """Whether searches run on a GPU."""
        return self._index is not self._cpu

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest keys of each query, nearest first.

        Args:
            queries: (B, D) unit rows, any floating type and device.
            k: neighbours.

        Returns:
            Similarity (B, k) float32 and position (B, k) int64, on the queries' device. Never an empty place. Exact
            search breaks ties by position, and a query's result does not depend on the others of its batch.

        Raises:
            InputError: the dimension differs, or k is larger than the index.
            RuntimeError: asked in a DataLoader worker.
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
            # Approximate indexes leave places empty (-1) where few lists or links were visited: search those in full.
            short = np.flatnonzero((position < 0).any(axis=1))
            if len(short):
                similarity[short], position[short] = self._exhaustive(array[short], k)
        return torch.from_numpy(similarity).to(queries.device), torch.from_numpy(position).to(queries.device)

    def _find(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        found: tuple[NDArray[np.float32], NDArray[np.int64]]
        found = (self._cpu if k > WIDE else self._index).search(queries, k)
        return found

    @property
    def _widths(self) -> tuple[int, ...]:
        # On the CPU a search for so many candidates costs more than comparing with all keys.
        return (WIDE,) if self.on_gpu else ()

    @functools.cached_property
    def keys(self) -> NDArray[np.float32]:
        """The (distinct) keys of an exact index in place, without a copy."""
        rows = int(self._cpu.ntotal)
        flat = faiss_module().rev_swig_ptr(self._cpu.get_xb(), rows * self.dimension)
        keys: NDArray[np.float32] = flat.reshape(rows, self.dimension)
        return keys

    def _exhaustive(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if self.kind == "ivf":
            wide = faiss_module().SearchParametersIVF(nprobe=self._cpu.nlist)
            similarity, position = self._cpu.search(queries, k, params=wide)
        else:  # keys that no link of the HNSW graph reaches are found by comparing with all
            keys = self._cpu.reconstruct_n(0, len(self))
            similarity, position = knn(queries, keys, k)
        return similarity, position

    def save(self, path: Path) -> None:
        """Write the index, completely or not at all; beside it the table of equal keys, where it has one."""
        if self.equal is None:
            path.with_name(EQUAL_FILE).unlink(missing_ok=True)
        else:
            self.equal.save(path.with_name(EQUAL_FILE))
        part = path.with_name(f".{path.name}.part")
        faiss_module().write_index(self._cpu, str(part))
        part.replace(path)

    @classmethod
    def load(cls, path: Path, device: Device = "auto") -> XrayIndex:
        """Read an index and its table of equal keys, memory-mapped, so that ranks of one host share their pages.

        Raises:
            InputError: a file is missing, damaged, or not one of this project's indexes.
        """
        faiss = faiss_module()
        if not path.is_file():
            raise InputError(f"{path}: no X-ray index here. Run stage 1 (`ctx-distill index`) to build it.")
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except (RuntimeError, MemoryError) as error:
            reason = str(error).strip().splitlines()[-1][-120:]
            raise InputError(f"{path}: not a readable FAISS index ({reason}). Run stage 1 again.") from error
        kinds: dict[str, IndexKind] = {"IndexFlat": "exact", "IndexFlatIP": "exact", "IndexIVFFlat": "ivf"}
        kinds["IndexHNSWFlat"] = "hnsw"
        kind = kinds.get(type(index).__name__)
        if kind is None or index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise InputError(
                f"{path}: holds a {type(index).__name__}; expected a flat, IVF or HNSW index by inner product. "
                "Run stage 1 again."
            )
        table = path.with_name(EQUAL_FILE)
        equal = EqualKeys.load(table) if table.is_file() else None
        if equal is not None and len(equal) != index.ntotal:
            raise InputError(
                f"{table}: names {len(equal)} distinct keys, {path.name} beside it holds {index.ntotal}. Run stage 1 again."
            )
        return cls(index, kind, device, equal=equal)


def knn(
    queries: NDArray[np.float32], keys: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k nearest of keys (N, D) that lie in no index, by inner product, compared with all: (B, k) each."""
    faiss = faiss_module()
    found: tuple[NDArray[np.float32], NDArray[np.int64]]
    found = faiss.knn(queries, keys, k, metric=faiss.METRIC_INNER_PRODUCT)
    return found


def gpu_wanted(device: Device) -> bool:
    """Whether an index goes onto this process's GPU.

    Raises:
        InputError: it is to, and FAISS sees no GPU.
    """
    faiss = faiss_module()
    gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if device == "gpu" and gpus == 0:
        raise InputError(
            "the X-ray index was asked onto a GPU, but FAISS sees none. "
            'Install "ctx-distill[gpu]" on a machine with an NVIDIA driver, or set device to auto or cpu.'
        )
    return device != "cpu" and gpus > 0


def gpu_of(device: Device, rank_device: torch.device) -> int | None:
    """The number of the GPU that an index goes to; None: it stays on the CPU.

    Args:
        device: as the settings ask for it.
        rank_device: where this rank computes.
    """
    if not gpu_wanted(device):
        return None
    if rank_device.type == "cuda":
        return torch.cuda.current_device() if rank_device.index is None else rank_device.index
    return 0 if device == "gpu" else None


def current_device() -> torch.device:
    """The GPU that this process has set, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def flat_on_gpu(keys: NDArray[np.float32], gpu: int, chunk: int = 262_144) -> Any:
    """An exact index over keys (N, D) on a GPU, filled part by part: the host holds no copy."""
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
