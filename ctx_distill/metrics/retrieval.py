"""Quality of a retrieval: findings Jaccard, same-set recall, and recall and rank of image-text retrieval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctx_distill.metrics.bootstrap import Groups, bootstrap_mean
from ctx_distill.metrics.score_blocks import CELLS, Candidates, Floats


def common_labels(
    names_a: Sequence[str], labels_a: ArrayLike, names_b: Sequence[str], labels_b: ArrayLike
) -> tuple[list[str], Floats, Floats]:
    """Return the label columns that two manifests share (ignoring case), in the order of the first.

    Args:
        names_a: F_a findings of `labels_a`.
        labels_a: (N, F_a).
        names_b: F_b findings of `labels_b`.
        labels_b: (M, F_b).

    Returns:
        F common names in the spelling of the first, and labels (N, F) and (M, F); F may be 0.
    """
    a, b = np.asarray(labels_a, dtype=np.float64), np.asarray(labels_b, dtype=np.float64)
    where = {name.strip().lower(): i for i, name in enumerate(names_b)}
    pairs = [(i, where[key]) for i, name in enumerate(names_a) if (key := name.strip().lower()) in where]
    return [names_a[i] for i, _ in pairs], a[:, [i for i, _ in pairs]], b[:, [j for _, j in pairs]]


def _present(labels: ArrayLike) -> Floats:
    array = np.asarray(labels, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"labels have shape {array.shape}; expected (N, F).")
    present: Floats = (array == 1).astype(np.float64)  # -1 and NaN are not 1
    return present


def _jaccard(a: Floats, b: Floats) -> Floats:
    both = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1)[None, :] - both
    result: Floats = np.where(union > 0, both / np.maximum(union, 1), 1.0)
    return result


def findings_jaccard(a: ArrayLike, b: ArrayLike) -> Floats:
    """Return |A n B| / |A u B| of the sets of present findings of every pair, (N, M); 1 for two empty sets.

    Args:
        a: (N, F) of 1, 0, -1 or NaN; only 1 is present.
        b: (M, F), the same findings in the same order (see `common_labels`).

    Raises:
        ValueError: shapes do not match.
    """
    x, y = _present(a), _present(b)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"labels of {x.shape[1]} and {y.shape[1]} findings; expected the same findings in one order.")
    return _jaccard(x, y)


def random_hit(same: Floats, pool: int, k: int) -> Floats:
    """Return 1 - C(M-m, k) / C(M, k), the chance that k of M drawn without replacement contain one of m right answers."""
    missed = np.ones(len(same))
    for i in range(min(k, pool)):
        missed *= np.clip(pool - same - i, 0, None) / (pool - i)
    hit: Floats = 1 - missed
    return hit


def retrieval_quality(
    query_labels: ArrayLike,
    pool_labels: ArrayLike,
    nearest: ArrayLike,
    patients: Groups,
    seed: int = 0,
    n: int = 1000,
    ks: Sequence[int] = (1, 5, 10),
    others: Mapping[str, ArrayLike] | None = None,
) -> dict[str, Any]:
    """Return whether retrieved items show the findings of the queries, with the levels of chance and of an oracle.

    The oracle reads the labels: for each query it takes the item of the pool with the largest Jaccard, an upper bound for
    any retrieval from this pool.

    Args:
        query_labels: (N, F) labels of the queries (CT val and test studies).
        pool_labels: (M, F) labels of the index, the same findings.
        nearest: (N, k) rows of the pool, best first; -1 (FAISS: no such neighbour) only behind the first column.
        patients: N patient ids of the queries.
        seed: seed of the bootstrap.
        n: number of replicates.
        ks: ranks for the recall.
        others: further retrievals by name, each like `nearest` ("tfidf").

    Returns:
        `jaccard_at_1` (mean findings Jaccard of query and first neighbour; value, low, high), `jaccard_random` (the
        exact mean over all N x M pairs), `jaccard_oracle` and `jaccard_<other>`, all also `_without_normals` (queries
        without a present finding excluded); `recall_at_k`, `recall_at_k_random`, `recall_at_k_oracle` and
        `recall_at_k_<other>` for k in `ks` (share of queries with an item of exactly their set of findings among the
        first k; None where fewer than k neighbours were retrieved), `same_set_in_pool` (share of queries for which
        there is such an item at all), `queries`, `queries_without_normals`, `pool`.

    Raises:
        ValueError: shapes do not match, the pool is empty, or a neighbour is outside the pool.
    """
    queries, pool = _present(query_labels), _present(pool_labels)
    count = len(queries)
    if queries.shape[1] != pool.shape[1] or len(patients) != count:
        raise ValueError(
            f"retrieval_quality: query labels {queries.shape}, pool labels {pool.shape}, {len(patients)} patients; "
            "expected (N, F), (M, F), N."
        )
    if not len(pool):
        raise ValueError("retrieval_quality: the pool is empty.")
    lists = {name: _checked(name, rows, count, len(pool)) for name, rows in {"": nearest, **(others or {})}.items()}

    random, same, best = np.empty(count), np.empty(count), np.empty(count)
    at_one = {name: np.empty(count) for name in lists}
    hits: dict[str, NDArray[np.bool_]] = {name: np.zeros(rows.shape, dtype=bool) for name, rows in lists.items()}
    step = max(1, CELLS // len(pool))
    for start in range(0, count, step):
        rows = slice(start, start + step)
        jaccard = _jaccard(queries[rows], pool)
        alike = jaccard == 1.0
        random[rows], same[rows], best[rows] = jaccard.mean(1), alike.sum(1), jaccard.max(1)
        for name, neighbours in lists.items():
            near = neighbours[rows]
            at_one[name][rows] = np.take_along_axis(jaccard, near[:, :1], 1)[:, 0]
            hits[name][rows] = np.take_along_axis(alike, np.maximum(near, 0), 1) & (near >= 0)

    ids, found = np.asarray(patients), (same > 0).astype(np.float64)
    abnormal = queries.sum(1) > 0
    result: dict[str, Any] = {}
    for suffix, of in (("", np.ones(count, dtype=bool)), ("_without_normals", abnormal)):
        result[f"jaccard_at_1{suffix}"] = bootstrap_mean(at_one[""][of], ids[of], n, seed).as_json()
        named = {"random": random, "oracle": best, **{name: values for name, values in at_one.items() if name}}
        result |= {f"jaccard_{name}{suffix}": _mean(values[of]) for name, values in named.items()}
    for k in ks:
        for name, hit in hits.items():
            enough = hit.shape[1] >= min(k, len(pool))
            told = _mean(np.any(hit[:, :k], axis=1).astype(np.float64)) if enough else None
            result[f"recall_at_{k}{'_' if name else ''}{name}"] = told
        result[f"recall_at_{k}_random"] = _mean(random_hit(same, len(pool), k))
        result[f"recall_at_{k}_oracle"] = _mean(found)
    result["same_set_in_pool"] = _mean(found)
    return {**result, "queries": count, "queries_without_normals": int(abnormal.sum()), "pool": len(pool)}


def _checked(name: str, nearest: ArrayLike, count: int, pool: int) -> NDArray[np.int64]:
    neighbours = np.asarray(nearest, dtype=np.int64)
    what = f"retrieval_quality: nearest{f' of {name}' if name else ''}"
    if neighbours.ndim != 2 or len(neighbours) != count or neighbours.shape[1] < 1:
        raise ValueError(f"{what} is {neighbours.shape}; expected ({count}, k) with k of 1 or more.")
    if count and (neighbours.max() >= pool or neighbours.min() < -1 or neighbours[:, 0].min() < 0):
        raise ValueError(f"{what}: a neighbour is outside the pool of {pool} rows.")
    return neighbours


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if len(values) else None


def best_ranks(
    queries: ArrayLike, candidates: ArrayLike, query_studies: Groups, candidate_studies: Groups, cells: int = CELLS
) -> Floats:
    """Return the rank of each query's best positive by inner product, 1 the best: (N,), NaN for a query without a positive.

    Candidates of the query's own study are all positives (images and reports of one study are duplicates): they do
    not push each other down. Ties count against the query, so a constant similarity gives the worst rank. Collective:
    the ranks of a run share the queries; the result does not depend on how many they are, or on `cells`.

    Args:
        queries: (N, D) features.
        candidates: (M, D) features.
        query_studies: N study ids.
        candidate_studies: M study ids.
        cells: of the N x M similarities, held at once.

    Raises:
        ValueError: shapes do not match, or a feature is not finite.
    """
    x, y = np.asarray(queries, dtype=np.float64), np.asarray(candidates, dtype=np.float64)
    ids = np.asarray(query_studies), np.asarray(candidate_studies)
    fit = x.ndim == y.ndim == 2 and x.shape[1] == y.shape[1]
    if not fit or (len(x), len(y)) != (len(ids[0]), len(ids[1])):
        raise ValueError(
            f"queries are {x.shape} with {len(ids[0])} studies, candidates {y.shape} with {len(ids[1])}; expected (N, D) and"
            " (M, D) with N and M studies."
        )
    codes = np.unique(np.concatenate(ids), return_inverse=True)[1].reshape(-1)
    asked, others = codes[: len(x)], codes[len(x) :]
    ranks = Candidates(y).of_all(x, lambda block: block.ranks(asked[block.rows, None] == others), cells)
    return np.concatenate([np.zeros(0), *ranks])


def recall_at_k(
    queries: ArrayLike,
    candidates: ArrayLike,
    query_studies: Groups,
    candidate_studies: Groups,
    ks: Sequence[int] = (1, 5, 10, 50, 100),
) -> dict[str, float | int | None]:
    """Return recall and median rank of image-to-text or text-to-image retrieval; collective (see `best_ranks`).

    Args:
        queries: (N, D) features.
        candidates: (M, D) features.
        query_studies: N study ids.
        candidate_studies: M study ids; duplicates of a study are all positives.
        ks: ranks.

    Returns:
        `recall_at_k` for k in `ks` and `median_rank`, over the queries that have a positive (None where none has),
        and `queries`, how many those are.
    """
    ranks = best_ranks(queries, candidates, query_studies, candidate_studies)
    ranks = ranks[~np.isnan(ranks)]
    result: dict[str, float | int | None] = {
        f"recall_at_{k}": float((ranks <= k).mean()) if len(ranks) else None for k in ks
    }
    return {**result, "median_rank": float(np.median(ranks)) if len(ranks) else None, "queries": len(ranks)}
