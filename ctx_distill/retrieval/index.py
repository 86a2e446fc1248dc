"""The FAISS index over the keys of the X-ray pool. The only module that imports faiss, and only inside functions.

faiss after torch, always: imported before torch, a parallel search followed by a fork hangs the forked DataLoader
workers. Importing this module imports torch first. DataLoader workers never search: lookups belong to the training
process.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctx_distill.types import InputError

IndexKind = Literal["exact", "ivf", "hnsw"]
Device = Literal["auto", "cpu", "gpu"]
INDEX_FILE = "index.faiss"
HNSW_NEIGHBOURS = 32
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


@functools.cache
def _faiss() -> Any:
    refuse_two_faiss()
    import faiss

    faiss.cvar.distance_compute_blas_threshold = BLAS_FROM_BATCH
    return faiss


def _as_matrix(rows: Tensor | NDArray[np.floating]) -> NDArray[np.float32]:
    array = rows.detach().cpu().float().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
    if array.ndim != 2:
        raise ValueError(f"index got an array of shape {array.shape}; expected (rows, dimension)")
    return np.ascontiguousarray(array, dtype=np.float32)


class XrayIndex:
    """Nearest keys by inner product (cosine, as keys and queries are unit rows).

    Attributes:
        kind: exact, ivf or hnsw.
        recall: recall@1 against the exact index, measured when an approximate index was built; None otherwise.
    """

    def __init__(self, index: Any, kind: IndexKind, device: Device = "auto", recall: float | None = None) -> None:
        self._cpu = index
        self._index = _on_device(index, kind, device)
        self.kind: IndexKind = kind
        self.recall = recall

    def __len__(self) -> int:
        return int(self._cpu.ntotal)

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
            Similarity (B, k) float32 and position (B, k) int64, on the queries' device. Never an empty place.

        Raises:
            InputError: the dimension differs, or k is larger than the index.
        """
        array = _as_matrix(queries)
        if array.shape[1] != self.dimension:
            raise InputError(
                f"queries have {array.shape[1]} dimensions, the X-ray index {self.dimension}. "
                "Embed the reports with the expert that the index was built with, or build the index again."
            )
        if not 1 <= k <= len(self):
            raise InputError(f"{k} neighbours asked of an index of {len(self)} X-rays. Ask for 1 to {len(self)}.")
        if len(array) == 0:
            return queries.new_zeros((0, k), dtype=torch.float32), queries.new_zeros((0, k), dtype=torch.int64)
        similarity, position = self._index.search(array, k)
        # Approximate indexes leave places empty (-1) where few lists or links were visited: search those in full.
        short = np.flatnonzero((position < 0).any(axis=1))
        if len(short):
            similarity[short], position[short] = self._exhaustive(array[short], k)
        return torch.from_numpy(similarity).to(queries.device), torch.from_numpy(position).to(queries.device)

    def _exhaustive(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if self.kind == "ivf":
            wide = _faiss().SearchParametersIVF(nprobe=self._cpu.nlist)
            similarity, position = self._cpu.search(queries, k, params=wide)
        else:  # keys that no link of the HNSW graph reaches are found by comparing with all
            keys = self._cpu.reconstruct_n(0, len(self))
            similarity, position = _faiss().knn(queries, keys, k, metric=_faiss().METRIC_INNER_PRODUCT)
        return similarity, position

    def save(self, path: Path) -> None:
        """Write the index, whole or not at all."""
        part = path.with_name(f".{path.name}.part")
        _faiss().write_index(self._cpu, str(part))
        part.replace(path)

    @classmethod
    def load(cls, path: Path, device: Device = "auto") -> XrayIndex:
        """Read an index, memory-mapped, so that ranks of one host share its pages.

        Raises:
            InputError: the file is missing, torn, or not one of this project's indexes.
        """
        faiss = _faiss()
        if not path.is_file():
            raise InputError(f"{path}: no X-ray index here. Run stage 1 (make stage-1) to build it.")
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
        return cls(index, kind, device)


def _on_device(index: Any, kind: IndexKind, device: Device) -> Any:
    """The index on this process's GPU where there is one and FAISS has a GPU form of this kind."""
    faiss = _faiss()
    gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if device == "gpu" and gpus == 0:
        raise InputError(
            "the X-ray index was asked onto a GPU, but FAISS sees none. "
            'Install "ctx-distill[gpu]" on a machine with an NVIDIA driver, or set device to auto or cpu.'
        )
    if device == "cpu" or gpus == 0 or kind == "hnsw":
        return index
    place = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), place, index)


def recall_at_1(index: XrayIndex, keys: Tensor | NDArray[np.floating], queries: Tensor) -> float:
    """Share of queries whose first neighbour is as near as the nearest of all keys.

    Args:
        index: an index over the keys.
        keys: (N, D).
        queries: (Q, D) unit rows.
    """
    exact = build_index(keys, "exact", device="cpu")
    best, _ = exact.search(queries, 1)
    found, _ = index.search(queries, 1)
    return float((found >= best - 1e-5).float().mean())


def build_index(
    keys: Tensor | NDArray[np.floating],
    kind: IndexKind = "exact",
    device: Device = "auto",
    nprobe: int = 8,
    probes: Tensor | None = None,
    minimum_recall: float | None = None,
) -> XrayIndex:
    """Build an index over the keys.

    Args:
        keys: (N, D) unit rows.
        kind: `exact`; `ivf` (inverted lists, about 4 sqrt(N) of them); `hnsw` (a graph).
        device: `auto`: the GPU where FAISS has one.
        nprobe: lists visited a query (ivf).
        probes: (Q, D) queries to measure recall@1 of an approximate index with; default: up to 256 keys, disturbed.
        minimum_recall: refuse an approximate index below it.

    Raises:
        InputError: no keys, keys that are not finite, or recall below the minimum.
    """
    faiss = _faiss()
    array = _as_matrix(keys)
    rows, dimension = array.shape
    if rows == 0:
        raise InputError("no X-rays to index; expected at least one. See what the X-ray manifest's filters left out.")
    # Not isfinite(array): that would be a second array as long as the first.
    if not np.isfinite(array.sum(axis=1)).all():
        bad = int(np.flatnonzero(~np.isfinite(array.sum(axis=1)))[0])
        raise InputError(f"key {bad} of the X-ray index is not finite. Check the expert's weights and the item's text.")
    if kind == "exact":
        index: Any = faiss.IndexFlatIP(dimension)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dimension, HNSW_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 80, 64
    elif kind == "ivf":
        lists = max(1, min(round(4 * math.sqrt(rows)), rows // 39))  # k-means wants 39 points a list
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimension), dimension, lists, faiss.METRIC_INNER_PRODUCT)
        index.train(array)
        index.nprobe = min(nprobe, lists)
    else:
        raise ValueError(f"index kind is {kind!r}; expected exact, ivf or hnsw")
    index.add(array)
    built = XrayIndex(index, kind, device)
    if kind != "exact":
        if probes is None:
            draw = np.random.default_rng(0)
            base = array[draw.choice(rows, min(rows, 256), replace=False)]
            probes = torch.from_numpy(base + draw.normal(0, 0.3 / math.sqrt(dimension), base.shape).astype(np.float32))
        built.recall = recall_at_1(built, array, torch.nn.functional.normalize(probes.float(), dim=-1))
        if minimum_recall is not None and built.recall < minimum_recall:
            raise InputError(
                f"recall@1 of the {kind} index is {built.recall:.3f}; expected at least {minimum_recall}. "
                "Raise nprobe, or use kind exact."
            )
    return built
