"""Exact nearest keys whose result does not depend on the batch, or on how the keys were cut into parts.

A matrix product of FAISS rounds differently with the number of queries and keys, so that near ties change places. Here
FAISS only names candidates; their similarities are computed again in float64, one key and query at a time, rounded to
float32 and sorted, ties by position. A query then gets the same bits alone, in a batch, and from parts merged.

Where keys repeat, the index holds the distinct ones, and a table says which positions share one (`EqualKeys`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ctx_distill.retrieval.equal import EqualKeys

Find = Callable[[NDArray[np.float32], int], tuple[NDArray[np.float32], NDArray[np.int64]]]
SPARE = 16
WIDE = 2048
"""The most candidates that FAISS finds on a GPU."""
ROUNDING = 1e-5
"""More than a float32 inner product of unit rows is off by."""
TIE = 2.0**-22
"""More than two similarities differ by that are equal once rounded to float32."""
FLOAT64 = 1e-12
"""More than a float64 inner product of unit rows is off by."""
CHUNK = 8_192
TOGETHER = 64
"""Queries that are compared with all keys at once; bounds the memory."""


def exact_neighbours(
    find: Find,
    keys: NDArray[np.float32],
    queries: NDArray[np.float32],
    k: int,
    equal: EqualKeys | None = None,
    widths: Sequence[int] = (),
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k nearest keys of each query, nearest first, ties by position.

    Args:
        find: the nearest candidates by an inner product in float32: (B, D), width -> similarity and number of the key,
            both (B, width), nearest first.
        keys: (G, D) unit rows, distinct ones where `equal` is given; may be memory-mapped.
        queries: (B, D) unit rows.
        k: 1 to the number of positions.
        equal: which positions share each key; None: key and position are the same.
        widths: numbers of candidates to try, beside k + 16, before a query is compared with all keys.

    Returns:
        Similarity (B, k) float32 and position (B, k) int64.
    """
    similarity = np.empty((len(queries), k), dtype=np.float32)
    position = np.empty((len(queries), k), dtype=np.int64)
    unsure = np.arange(len(queries))
    for width in sorted({min(len(keys), k + SPARE), *(min(len(keys), width) for width in widths if width > k)}):
        if not len(unsure):
            return similarity, position
        left = []
        for place, rough, found in zip(unsure, *find(queries[unsure], width), strict=True):
            chosen = found[rough >= _kth(rough, found, k, equal) - 2 * ROUNDING]
            near = _similarities(keys[chosen], queries[place]).astype(np.float32)
            similarity[place], position[place] = _best(near, chosen, k, equal)
            # Keys as near as the last neighbour may be missing among the candidates.
            if width < len(keys) and rough[-1] >= similarity[place, -1] - ROUNDING:
                left.append(place)
        unsure = np.array(left, dtype=np.int64)
    for start in range(0, len(unsure), TOGETHER):
        places = unsure[start : start + TOGETHER]
        compared = _compared_with_all(keys, queries[places], similarity[places, -1] - ROUNDING, k)
        for place, (near, found) in zip(places, compared, strict=True):
            similarity[place], position[place] = _best(near, found, k, equal)
    return similarity, position


def _kth(rough: NDArray[np.float32], found: NDArray[np.int64], k: int, equal: EqualKeys | None) -> float:
    """Similarity of the candidate, they come nearest first, with which k positions are complete."""
    if equal is None:
        return float(rough[min(k, len(rough)) - 1])
    complete = int((np.cumsum(equal.sizes(found)) < k).sum())
    return float(rough[min(complete, len(rough) - 1)])


def _best(
    similarity: NDArray[np.float32], found: NDArray[np.int64], k: int, equal: EqualKeys | None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k best positions of some keys, (n,) similarities and numbers."""
    if equal is not None:
        places, found = equal.positions(found, k)
        similarity = similarity[places]
    order = np.lexsort((found, -similarity))[:k]
    return similarity[order], found[order]


def _similarities(keys: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n,) of keys (n, D): each row is summed by itself, so that its bits do not depend on the others."""
    summed: NDArray[np.float64] = (keys.astype(np.float64) * query.astype(np.float64)).sum(axis=1)
    return summed


def _compared_with_all(
    keys: NDArray[np.float32], queries: NDArray[np.float32], bound: NDArray[np.float32], k: int
) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """For each query the similarity, rounded to float32, and the number of the keys that may be among its k nearest.

    Args:
        keys: (G, D).
        queries: (B, D).
        bound: (B,) that a key's similarity in float32 must reach.
        k: neighbours.
    """
    reached = []
    for start in range(0, len(keys), CHUNK):
        good = queries @ keys[start : start + CHUNK].T >= bound[:, None]
        reached.append(np.flatnonzero(good.any(axis=0)) + start)
    union = np.concatenate(reached)
    wide = queries.astype(np.float64)
    scores: list[NDArray[np.float64]] = [np.empty(0) for _ in queries]
    numbers: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64) for _ in queries]
    for start in range(0, len(union), CHUNK):
        part = union[start : start + CHUNK]
        for place, row in enumerate(wide @ keys[part].astype(np.float64).T):
            joined, number = np.concatenate([scores[place], row]), np.concatenate([numbers[place], part])
            if len(joined) > k:
                good = joined >= np.partition(joined, -k)[-k] - TIE
                joined, number = joined[good], number[good]
            scores[place], numbers[place] = joined, number
    return [
        (_rounded(near, keys, number, query), number)
        for near, number, query in zip(scores, numbers, queries, strict=True)
    ]


def _rounded(
    similarity: NDArray[np.float64], keys: NDArray[np.float32], numbers: NDArray[np.int64], query: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Rounded to float32; those so near to the middle of two float32 that the way of summing decides, summed as everywhere."""
    rounded = similarity.astype(np.float32)
    unsure = np.flatnonzero((similarity - FLOAT64).astype(np.float32) != (similarity + FLOAT64).astype(np.float32))
    rounded[unsure] = _similarities(keys[numbers[unsure]], query).astype(np.float32)
    return rounded


def merge(
    similarity: NDArray[np.float32], position: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k best of the neighbours that several parts found, (B, M) each, nearest first, ties by position."""
    order = np.lexsort((position, -similarity), axis=-1)[:, :k]
    return np.take_along_axis(similarity, order, axis=1), np.take_along_axis(position, order, axis=1)
