"""Build the index in parts from keys in memory or memory-mapped, and measure its recall against exact search."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctx_distill.retrieval.equal import Keys, equal_keys
from ctx_distill.retrieval.index import Device, IndexKind, XrayIndex, as_matrix, faiss_module, knn
from ctx_distill.types import InputError

HNSW_NEIGHBOURS = 32
SEARCH_WIDTH = {"ivf": 8, "hnsw": 64}
CHUNK = 65_536
POINTS_A_LIST = 39
"""Minimum keys per inverted list for FAISS's k-means."""
TRAINING_POINTS = 64
"""Training keys per list for k-means; more hardly change the recall."""


def recall_at_1(index: XrayIndex, keys: Keys, queries: Tensor) -> float:
    """Return the share of queries whose first neighbour is as similar as the most similar of all keys.

    Args:
        index: An index over the keys.
        keys: (N, D).
        queries: (Q, D) unit rows.
    """
    matrix = as_matrix(queries)
    best = np.full(len(matrix), -np.inf, dtype=np.float32)
    for start in range(0, len(keys), CHUNK):
        part = as_matrix(keys[start : start + CHUNK])
        best = np.maximum(best, knn(matrix, part, 1)[0][:, 0])
    similarity, _ = index.search(queries, 1)
    return float((similarity[:, 0].cpu().numpy() >= best - 1e-5).mean())


def construct(
    keys: Keys, kind: IndexKind = "exact", device: Device = "auto", search_width: int | None = None
) -> XrayIndex:
    """Build an index without measuring its recall; see `build_index`. An exact index stores equal keys once.

    Keys are read in parts, so that memory-mapped keys are not copied into memory.
    """
    faiss = faiss_module()
    rows, dimension = keys.shape
    equal = None
    if rows == 0:
        raise InputError("no X-rays to index; expected at least one. Check what the X-ray manifest's filters excluded.")
    if kind == "exact":
        index: Any = faiss.IndexFlatIP(dimension)
        equal = equal_keys(keys)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dimension, HNSW_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 80, search_width or SEARCH_WIDTH[kind]
    elif kind == "ivf":
        lists = max(1, min(round(4 * math.sqrt(rows)), rows // POINTS_A_LIST))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimension), dimension, lists, faiss.METRIC_INNER_PRODUCT)
        chosen = np.sort(np.random.default_rng(0).choice(rows, min(rows, TRAINING_POINTS * lists), replace=False))
        index.train(_finite(as_matrix(keys[chosen]), 0))
        index.nprobe = min(search_width or SEARCH_WIDTH[kind], lists)
    else:
        raise ValueError(f"index kind is {kind!r}; expected exact, ivf or hnsw")
    for start in range(0, rows, CHUNK):
        part = _finite(as_matrix(keys[start : start + CHUNK]), start)
        if equal is not None:
            firsts = equal.firsts
            part = part[firsts[np.searchsorted(firsts, start) : np.searchsorted(firsts, start + CHUNK)] - start]
        index.add(part)
    return XrayIndex(index, kind, device, equal=equal)


def _finite(part: NDArray[np.float32], start: int) -> NDArray[np.float32]:
    good = np.isfinite(part.sum(axis=1))
    if not good.all():
        bad = start + int(np.flatnonzero(~good)[0])
        raise InputError(
            f"key {bad} of the X-ray index is not finite. Check the expert's weights and the X-ray's report."
        )
    return part


def build_index(
    keys: Keys,
    kind: IndexKind = "exact",
    device: Device = "auto",
    search_width: int | None = None,
    probes: Tensor | None = None,
    minimum_recall: float | None = None,
) -> XrayIndex:
    """Build an index over the keys.

    Args:
        keys: (N, D) unit rows.
        kind: `exact`, `ivf` (about 4 sqrt(N) inverted lists) or `hnsw` (a graph).
        device: `auto` uses the GPU if FAISS supports it.
        search_width: Lists visited per query (ivf, default 8), or candidates kept during the graph search (hnsw, default
            64).
        probes: (Q, D) queries for the recall@1 of an approximate index. Default: up to 256 keys with added noise.
        minimum_recall: Minimum recall@1 of an approximate index.

    Raises:
        InputError: There are no keys, a key is not finite, or the recall is too low.
    """
    built = construct(keys, kind, device, search_width)
    if kind != "exact":
        if probes is None:
            probes = disturbed(keys)
        built.recall = recall_at_1(built, keys, torch.nn.functional.normalize(probes.float(), dim=-1))
        if minimum_recall is not None and built.recall < minimum_recall:
            raise InputError(
                f"recall@1 of the {kind} index is {built.recall:.3f}; expected at least {minimum_recall}. "
                f"Increase model.init_args.search_width (now {search_width or SEARCH_WIDTH[kind]}), or set "
                "index_kind=exact."
            )
    return built


def disturbed(keys: Keys, queries: int = 256) -> Tensor:
    """Return up to `queries` random keys (Q, D), with added noise of norm 0.3."""
    rows, dimension = keys.shape
    draw = np.random.default_rng(0)
    base = as_matrix(keys[draw.choice(rows, min(rows, queries), replace=False)])
    return torch.from_numpy(base + draw.normal(0, 0.3 / math.sqrt(dimension), base.shape).astype(np.float32))
