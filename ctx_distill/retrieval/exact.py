"""Exact nearest keys whose result does not depend on who asked together, or on how the keys were cut into parts.

A matrix product of FAISS rounds differently with the number of queries and keys, so that near ties change places. Here
FAISS only names candidates; their similarities are computed again in float64, one query at a time, rounded to float32
and sorted, ties by position. A query then gets the same bits alone, in a batch, and from parts merged.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Find = Callable[[NDArray[np.float32], int], tuple[NDArray[np.float32], NDArray[np.int64]]]
SPARE = 16
WIDE = 2048
"""Candidates of the second try: as many as FAISS finds on a GPU."""
ROUNDING = 1e-5
"""More than a float32 inner product of unit rows is off by."""
CHUNK = 65_536


def exact_neighbours(
    find: Find, keys: NDArray[np.float32], queries: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k nearest keys of each query, nearest first, ties by position.

    Args:
        find: the nearest candidates by an inner product in float32: (B, D), width -> similarity and position, both
            (B, width), nearest first.
        keys: (N, D) unit rows; may be memory-mapped, only candidates are read.
        queries: (B, D) unit rows.
        k: 1 to N.

    Returns:
        Similarity (B, k) float32 and position (B, k) int64.
    """
    similarity = np.empty((len(queries), k), dtype=np.float32)
    position = np.empty((len(queries), k), dtype=np.int64)
    unsure = np.arange(len(queries))
    for width in sorted({min(len(keys), k + SPARE), min(len(keys), max(k + SPARE, WIDE))}):
        if not len(unsure):
            return similarity, position
        rough, candidates = find(queries[unsure], width)
        for place, last, found in zip(unsure, rough[:, -1], candidates, strict=True):
            similarity[place], position[place] = _best(keys, queries[place], found, k)
            # Keys as near as the last neighbour may lie behind the last candidate: reports are often word for word the same.
            if width == len(keys) or last < similarity[place, -1] - ROUNDING:
                unsure = unsure[unsure != place]
    if len(unsure):
        near = [[] for _ in unsure]  # type: list[list[NDArray[np.int64]]]
        bound = similarity[unsure, -1] - ROUNDING
        for start in range(0, len(keys), CHUNK):
            scores = queries[unsure] @ keys[start : start + CHUNK].T
            for found, row in zip(near, scores >= bound[:, None], strict=True):
                found.append(np.flatnonzero(row) + start)
        for place, found in zip(unsure, near, strict=True):
            similarity[place], position[place] = _best(keys, queries[place], np.concatenate(found), k)
    return similarity, position


def _best(
    keys: NDArray[np.float32], query: NDArray[np.float32], candidates: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    similarity = (keys[candidates].astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
    order = np.lexsort((candidates, -similarity))[:k]
    return similarity[order], candidates[order]


def merge(
    similarity: NDArray[np.float32], position: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k best of the neighbours that several parts found, (B, M) each, nearest first, ties by position."""
    order = np.lexsort((position, -similarity), axis=-1)[:, :k]
    return np.take_along_axis(similarity, order, axis=1), np.take_along_axis(position, order, axis=1)
