"""TF-IDF retrieval of reports: what words alone give, the baseline that an embedding has to beat."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LARGEST_VOCABULARY = 200_000
"""Words and pairs of words that are kept, the most frequent: a pool of 10^5 reports has millions of pairs."""
_BLOCK = 4_000_000
"""Cells of the query-by-pool matrix that are held at once."""


def tfidf_nearest(queries: Sequence[str], pool: Sequence[str], k: int) -> NDArray[np.int64]:
    """The k pool texts of the largest TF-IDF cosine: words and pairs of words, weights fitted on the pool.

    Args:
        queries: N texts.
        pool: M texts; "" is alike to nothing.
        k: neighbours, at most M.

    Returns:
        (N, k) positions in the pool, best first; among equals the earlier one.

    Raises:
        ValueError: no text of the pool has a word, or k is not between 1 and M.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(re.search(r"\w", text) for text in pool):
        raise ValueError(f"tfidf_nearest: none of {len(pool)} pool texts has a word.")
    if not 1 <= k <= len(pool):
        raise ValueError(f"tfidf_nearest: {k} neighbours of a pool of {len(pool)}.")
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
