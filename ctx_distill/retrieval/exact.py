"""Exact nearest keys, bit-identical for any batch and any partition of the keys.

FAISS's matrix products round differently for different numbers of queries and keys, so near ties can change their order.
Here FAISS only returns candidates. Their similarities are recomputed in float64, one pair at a time, rounded to float32
and sorted, with ties broken by position. The result is then the same for a single query, a batch, and merged parts.

If keys repeat, the index holds the distinct ones, and a table maps them to positions (`EqualKeys`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ctx_distill.retrieval.equal import EqualKeys

Find = Callable[[NDArray[np.float32], int], tuple[NDArray[np.float32], NDArray[np.int64]]]
SPARE = 16
WIDE = 2048
"""Maximum number of candidates of FAISS on a GPU."""
ROUNDING = 1e-5
"""Upper bound of the rounding error of a float32 inner product of unit rows."""
TIE = 2.0**-22
"""Upper bound of the difference of two similarities that are equal in float32."""
FLOAT64 = 1e-12
"""Upper bound of the rounding error of a float64 inner product of unit rows."""
CHUNK = 8_192
TOGETHER = 64
"""Queries compared with all keys at once; limits the memory."""


def exact_neighbours(
    find: Find,
    keys: NDArray[np.float32],
    queries: NDArray[np.float32],
    k: int,
    equal: EqualKeys | None = None,
    widths: Sequence[int] = (),
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the k nearest keys of each query, nearest first, with ties in order of position.

    Args:
        find: Returns candidates by float32 inner product: maps (B, D) and width to similarities and key numbers, both
            (B, width), nearest first.
        keys: (G, D) unit rows, distinct if `equal` is set; may be memory-mapped.
        queries: (B, D) unit rows.
        k: Neighbours, from 1 to the number of positions.
        equal: Positions that share each key; None if keys and positions are the same.
        widths: Numbers of candidates to try, in addition to k + 16, before a query is compared with all keys.

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
        for place, rough, numbers in zip(unsure, *find(queries[unsure], width), strict=True):
            chosen = numbers[rough >= _kth(rough, numbers, k, equal) - 2 * ROUNDING]
            near = _similarities(keys[chosen], queries[place]).astype(np.float32)
            similarity[place], position[place] = _best(near, chosen, k, equal)
            # The candidates may lack keys that are as similar as the last neighbour.
            if width < len(keys) and rough[-1] >= similarity[place, -1] - ROUNDING:
                left.append(place)
        unsure = np.array(left, dtype=np.int64)
    for start in range(0, len(unsure), TOGETHER):
        places = unsure[start : start + TOGETHER]
        compared = _compared_with_all(keys, queries[places], similarity[places, -1] - ROUNDING, k)
        for place, (near, numbers) in zip(places, compared, strict=True):
            similarity[place], position[place] = _best(near, numbers, k, equal)
    return similarity, position


def _kth(rough: NDArray[np.float32], numbers: NDArray[np.int64], k: int, equal: EqualKeys | None) -> float:
    """Return the similarity of the candidate that completes k positions; candidates are ordered nearest first."""
    if equal is None:
        return float(rough[min(k, len(rough)) - 1])
    complete = int((np.cumsum(equal.sizes(numbers)) < k).sum())
    return float(rough[min(complete, len(rough) - 1)])


def _best(
    similarity: NDArray[np.float32], numbers: NDArray[np.int64], k: int, equal: EqualKeys | None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return similarity and position of the k best positions, given similarities and numbers (n,) of keys."""
    positions = numbers
    if equal is not None:
        places, positions = equal.positions(numbers, k)
        similarity = similarity[places]
    order = np.lexsort((positions, -similarity))[:k]
    return similarity[order], positions[order]


def _similarities(keys: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the similarities (n,) of keys (n, D); each row is summed separately, so its bits do not depend on others."""
    summed: NDArray[np.float64] = (keys.astype(np.float64) * query.astype(np.float64)).sum(axis=1)
    return summed


def _compared_with_all(
    keys: NDArray[np.float32], queries: NDArray[np.float32], bound: NDArray[np.float32], k: int
) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Return, per query, similarity (in float32) and number of the keys that may be among its k nearest.

    Args:
        keys: (G, D).
        queries: (B, D).
        bound: (B,) minimum similarity of a key, in float32.
        k: Neighbours.
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
    """Round to float32; values close to the middle of two float32 numbers are recomputed with `_similarities`."""
    rounded = similarity.astype(np.float32)
    unsure = np.flatnonzero((similarity - FLOAT64).astype(np.float32) != (similarity + FLOAT64).astype(np.float32))
    rounded[unsure] = _similarities(keys[numbers[unsure]], query).astype(np.float32)
    return rounded


def merge(
    similarity: NDArray[np.float32], position: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the k best of the neighbours from several parts, (B, M) each, nearest first, ties in order of position."""
    order = np.lexsort((position, -similarity), axis=-1)[:, :k]
    return np.take_along_axis(similarity, order, axis=1), np.take_along_axis(position, order, axis=1)
