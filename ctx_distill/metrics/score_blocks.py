"""Scores of every query with every candidate, in blocks of queries; the result does not depend on the block size.

The rounding of a matrix product depends on its shape. Equal scores (of two candidates with the same features) may differ in
the last bit, and another block size would change a tie. So the product decides only where its rounding error leaves no doubt.
Closer scores are computed again, one pair at a time, by a sum whose order depends on the pair alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

T = TypeVar("T")
Floats = NDArray[np.float64]
CELLS = 4_000_000
"""Cells of a query-by-candidate matrix that are held at once: 32 MB of scores, and about 100 MB with what is derived from them."""
_MANY = 64
"""Close scores of one query from which on candidates with equal features are computed once."""


class Candidates:
    """The candidates that queries are compared with, by inner product.

    Args:
        features: (M, D).

    Raises:
        ValueError: a feature is not finite.
    """

    def __init__(self, features: ArrayLike) -> None:
        self.features = _finite(features)
        self._largest = float(np.linalg.norm(self.features, axis=1).max()) if len(self.features) else 0.0
        self._first: NDArray[np.intp] | None = None

    def of_all(self, queries: ArrayLike, evaluate: Callable[[ScoreBlock], T], cells: int = CELLS) -> list[T]:
        """Return what `evaluate` makes of the scores of all queries, block by block in their order.

        Collective: the ranks of a run share the queries, and each returns all results.

        Args:
            queries: (N, D), the same on every rank.
            evaluate: gives something that can be pickled.
            cells: of the matrix that are held at once; one query at least.

        Raises:
            ValueError: a feature is not finite.
        """
        from ctx_distill.distributed import gather_objects, own_share  # torch: a complete run is reported without it

        given = _finite(queries)
        mine, step = own_share(len(given)), max(1, cells // max(1, len(self.features)))
        starts = range(len(given))[mine][::step]
        stop = min(len(given), mine.stop)
        return gather_objects([evaluate(ScoreBlock(given, slice(i, min(stop, i + step)), self)) for i in starts])

    def exact(self, query: Floats, columns: NDArray[np.intp]) -> Floats:
        """Return the scores of a query (D,) with some candidates; each depends on its pair alone, to the last bit."""
        inverse = None
        if len(columns) > _MANY:
            columns, inverse = np.unique(self._first_equal()[columns], return_inverse=True)
        scores: Floats = np.multiply(self.features[columns], query).sum(axis=1)
        return scores if inverse is None else scores[inverse]

    def slack(self, queries: Floats) -> Floats:
        """Return (n,): by how much the difference of two scores of the product may differ from that of `exact`, at most.

        Either sum of D products is off by no more than D eps / 2 |q| |p| (Higham 2002, section 3.1).
        """
        dim = self.features.shape[1]
        slack: Floats = 4 * dim * np.finfo(np.float64).eps * self._largest * np.linalg.norm(queries, axis=1)
        return slack

    def _first_equal(self) -> NDArray[np.intp]:
        """For each candidate, the first one with the same features (M,)."""
        if self._first is None:
            rows = np.ascontiguousarray(self.features).view(np.dtype((np.void, self.features.strides[0]))).reshape(-1)
            _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
            self._first = first[inverse.reshape(-1)]
        return self._first


class ScoreBlock:
    """Scores of n queries with all M candidates.

    Attributes:
        rows: which of all queries these are.
    """

    def __init__(self, queries: Floats, rows: slice, candidates: Candidates) -> None:
        self.rows = rows
        self._queries, self._candidates = queries[rows], candidates
        self._scores: Floats = self._queries @ candidates.features.T
        self._slack = candidates.slack(self._queries)[:, None]

    def ranks(self, positive: NDArray[np.bool_]) -> Floats:
        """Return the rank of each query's best positive (n,), 1 the best; NaN without a positive.

        It is 1 and the number of other candidates whose score is as high or higher: ties count against the query.

        Args:
            positive: (n, M) the right answers; they do not push each other down.
        """
        scores, slack = self._scores, self._slack
        best = np.where(positive, scores, -np.inf).max(axis=1, initial=-np.inf, keepdims=True)
        others = np.where(positive, -np.inf, scores)
        ahead = np.count_nonzero(others > best + slack, axis=1)
        unsure = np.count_nonzero(others >= best - slack, axis=1) > ahead
        ranks = 1.0 + ahead
        for row in np.flatnonzero(unsure & np.isfinite(best[:, 0])):
            columns = np.flatnonzero(np.abs(scores[row] - best[row]) <= slack[row])
            exact, right = self._candidates.exact(self._queries[row], columns), positive[row, columns]
            ranks[row] += np.count_nonzero(exact[~right] >= exact[right].max())
        return np.where(np.isfinite(best[:, 0]), ranks, np.nan)

    def nearest(self) -> NDArray[np.intp]:
        """Return the candidate with the highest score of each query (n,), the first of equals; M is at least 1."""
        found: NDArray[np.intp] = self._scores.argmax(axis=1)
        near = self._scores >= self._scores.max(axis=1, keepdims=True) - self._slack
        for row in np.flatnonzero(np.count_nonzero(near, axis=1) > 1):
            columns = np.flatnonzero(near[row])
            found[row] = columns[self._candidates.exact(self._queries[row], columns).argmax()]
        return found


def _finite(features: ArrayLike) -> Floats:
    array = np.ascontiguousarray(features, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("features hold NaN or infinity: the embeddings are not numbers.")
    return array
