"""TF-IDF retrieval of reports, the word-based baseline for an embedding."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LARGEST_VOCABULARY = 200_000
"""Most frequent words and pairs of words to use: a pool of 10^5 reports has millions of pairs."""
_BLOCK = 4_000_000
"""Cells of the query-by-pool matrix in memory at once."""


def tfidf_nearest(queries: Sequence[str], pool: Sequence[str], k: int) -> NDArray[np.int64]:
    """Return the k pool texts with the largest TF-IDF cosine, over words and pairs of words, with weights fitted on the pool.

    Args:
        queries: N texts.
        pool: M texts; "" is similar to nothing.
        k: number of neighbours, at most M.

    Returns:
        Positions in the pool (N, k), best first; of equal ones the earlier.

    Raises:
        ValueError: no text of the pool has a word, or k is not between 1 and M.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(re.search(r"\w", text) for text in pool):
        raise ValueError(f"tfidf_nearest: none of {len(pool)} pool texts has a word.")
    if not 1 <= k <= len(pool):
        raise ValueError(f"tfidf_nearest: k is {k}; expected 1 to {len(pool)}, the size of the pool.")
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), token_pattern=r"\b\w+\b", max_features=LARGEST_VOCABULARY, dtype=np.float32
    )
    known = vectorizer.fit_transform(pool).T.tocsr()  # rows are unit vectors, so that products are cosines
    nearest = np.empty((len(queries), k), dtype=np.int64)
    step = max(1, _BLOCK // len(pool))
    for start in range(0, len(queries), step):
        scores = (vectorizer.transform(queries[start : start + step]) @ known).toarray()
        # A stable order of the whole block would be its largest cost: only rows of the k best places are sorted.
        bound = -np.partition(-scores, k - 1, axis=1)[:, k - 1]
        for row, (score, least) in enumerate(zip(scores, bound, strict=True), start):
            candidates = np.flatnonzero(score >= least)
            nearest[row] = candidates[np.argsort(-score[candidates], kind="stable")[:k]]
    return nearest
