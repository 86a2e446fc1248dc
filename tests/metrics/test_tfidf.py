"""TF-IDF neighbours against the formula, written out."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from ctx_distill.metrics import tfidf
from ctx_distill.metrics.tfidf import tfidf_nearest

WORDS = ["no", "small", "left", "right", "pleural", "effusion", "nodule", "heart", "enlarged", "clear", "lungs"]


def reports(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 12))).capitalize() + "." for _ in range(count)]


def terms(text: str) -> Counter[str]:
    words = text.lower().rstrip(".").split()
    return Counter([*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))])


def brute_force(queries: list[str], pool: list[str]) -> np.ndarray:
    """Cosines with weights tf (ln((1 + n) / (1 + df)) + 1) over the pool's words and pairs of words."""
    frequency = Counter(term for text in pool for term in terms(text))
    documents = Counter(term for text in pool for term in set(terms(text)))
    order = {term: i for i, term in enumerate(frequency)}

    def vectors(texts: list[str]) -> np.ndarray:
        rows = np.zeros((len(texts), len(order)))
        for i, text in enumerate(texts):
            for term, count in terms(text).items():
                if term in order:
                    rows[i, order[term]] = count * (math.log((1 + len(pool)) / (1 + documents[term])) + 1)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    return vectors(queries) @ vectors(pool).T


@pytest.mark.parametrize("block", [70, 4_000_000])
def test_nearest_are_those_of_the_formula(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfidf, "_BLOCK", block)
    queries, pool = reports(12, 0), [*reports(40, 1), ""]
    scores = brute_force(queries, pool)
    found = tfidf_nearest(queries, pool, 7)
    assert found.shape == (12, 7)
    np.testing.assert_allclose(np.take_along_axis(scores, found, 1), -np.sort(-scores, axis=1)[:, :7], atol=1e-6)
    assert tfidf_nearest(pool[:40], pool, 1)[:, 0].tolist() == list(range(40))


def test_among_equals_the_earlier_comes_first() -> None:
    pool = ["left effusion", "clear lungs", "left effusion", "clear lungs"]
    assert tfidf_nearest(["clear lungs", "unheard of"], pool, 3).tolist() == [[1, 3, 0], [0, 1, 2]]
    assert tfidf_nearest([], pool, 2).shape == (0, 2)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="none of 2 pool texts has a word"):
        tfidf_nearest(["x"], ["", "."], 1)
    with pytest.raises(ValueError, match="k is 3; expected 1 to 2"):
        tfidf_nearest(["x"], ["a", "b"], 3)
