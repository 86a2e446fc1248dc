"""Findings Jaccard, same-set recall and image-text ranks against brute force."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest

from ctx_distill.metrics import retrieval
from ctx_distill.metrics.retrieval import (
    best_ranks,
    common_labels,
    findings_jaccard,
    recall_at_k,
    retrieval_quality,
)


def _sets(labels: np.ndarray[Any, Any]) -> list[set[int]]:
    return [{f for f, value in enumerate(row) if value == 1} for row in labels]


def _jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


@pytest.fixture
def labels() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(2)
    return tuple(rng.choice([1, 0, -1, np.nan], p=[0.25, 0.55, 0.1, 0.1], size=(n, 4)) for n in (25, 40))


def test_jaccard_is_that_of_sets(labels: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]) -> None:
    a, b = labels
    brute = [[_jaccard(x, y) for y in _sets(b)] for x in _sets(a)]
    np.testing.assert_allclose(findings_jaccard(a, b), brute, atol=1e-12)
    assert findings_jaccard([[0, np.nan]], [[-1, 0]]).tolist() == [[1.0]]
    assert findings_jaccard([[1, 1]], [[1, 0], [0, 0]]).tolist() == [[0.5, 0.0]]
    with pytest.raises(ValueError, match="2 and 3"):
        findings_jaccard([[0, 1]], [[0, 1, 1]])


@pytest.mark.parametrize("block", [50, 4_000_000])
def test_quality_equals_brute_force(
    labels: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "CELLS", block)
    a, b = labels
    nearest = np.array([np.random.default_rng(i).permutation(40)[:10] for i in range(25)])
    patients = [f"p{i // 2}" for i in range(25)]
    other = nearest[:, ::-1][:, :6]
    result = retrieval_quality(a, b, nearest, patients, n=100, others={"other": other})
    sets, pool = _sets(a), _sets(b)
    at_one = [_jaccard(x, pool[near[0]]) for x, near in zip(sets, nearest)]
    random = [np.mean([_jaccard(x, y) for y in pool]) for x in sets]
    ill = [i for i, x in enumerate(sets) if x]
    assert 0 < len(ill) < 25
    assert result["jaccard_at_1"]["value"] == pytest.approx(np.mean(at_one))
    assert result["jaccard_at_1"]["low"] < np.mean(at_one) < result["jaccard_at_1"]["high"]
    assert result["jaccard_random"] == pytest.approx(np.mean(random))
    assert result["jaccard_at_1_without_normals"]["value"] == pytest.approx(np.mean([at_one[i] for i in ill]))
    assert result["jaccard_random_without_normals"] == pytest.approx(np.mean([random[i] for i in ill]))
    best = [max(_jaccard(x, y) for y in pool) for x in sets]
    second = [_jaccard(x, pool[near[0]]) for x, near in zip(sets, other)]
    for name, values in (("oracle", best), ("other", second)):
        assert result[f"jaccard_{name}"] == pytest.approx(np.mean(values))
        assert result[f"jaccard_{name}_without_normals"] == pytest.approx(np.mean([values[i] for i in ill]))
    for k in (1, 5, 10):
        others = [any(pool[j] == x for j in near[:k]) for x, near in zip(sets, other)]
        assert result[f"recall_at_{k}_other"] == (None if k == 10 else pytest.approx(np.mean(others)))
        assert result[f"recall_at_{k}_oracle"] == pytest.approx(np.mean([x in pool for x in sets]))
        hits = [any(pool[j] == x for j in near[:k]) for x, near in zip(sets, nearest)]
        assert result[f"recall_at_{k}"] == pytest.approx(np.mean(hits))
        chance = [1 - math.comb(40 - pool.count(x), k) / math.comb(40, k) for x in sets]
        assert result[f"recall_at_{k}_random"] == pytest.approx(np.mean(chance))
    assert result["same_set_in_pool"] == pytest.approx(np.mean([x in pool for x in sets]))
    assert (result["queries"], result["queries_without_normals"], result["pool"]) == (25, len(ill), 40)
    json.dumps(result)


def test_random_recall_is_the_mean_over_all_choices() -> None:
    query, pool = [[1, 0]], [[1, 0], [0, 0], [1, 0], [1, 1], [0, 1]]
    result = retrieval_quality(query, pool, [[0, 1]], ["p"], ks=(1, 2, 5))
    chosen = list(itertools.combinations(range(5), 2))
    assert result["recall_at_2_random"] == pytest.approx(np.mean([bool({0, 2} & set(c)) for c in chosen]))
    assert result["recall_at_1_random"] == pytest.approx(0.4)
    assert result["recall_at_5_random"] == pytest.approx(1.0)
    assert result["recall_at_5"] is None  # two neighbours cannot tell


def test_edges_and_refusals() -> None:
    normal = retrieval_quality([[0.0]], [[0.0], [1.0]], [[0, -1]], ["p"], ks=(2,))
    assert normal["jaccard_at_1_without_normals"] is None
    assert normal["jaccard_random_without_normals"] is None
    assert normal["recall_at_2"] == 1.0
    nobody = retrieval_quality(np.zeros((0, 1)), [[0.0]], np.zeros((0, 1), int), [])
    assert nobody["jaccard_at_1"] is None
    assert nobody["jaccard_random"] is None
    missing = retrieval_quality([[1.0]], [[0.0], [1.0]], [[0, -1]], ["p"], ks=(2,))
    assert missing["recall_at_2"] == 0.0  # -1 is not the pool's last row
    with pytest.raises(ValueError, match="outside"):
        retrieval_quality([[1.0]], [[1.0]], [[1]], ["p"])
    with pytest.raises(ValueError, match="outside"):
        retrieval_quality([[1.0]], [[1.0]], [[-1]], ["p"])
    with pytest.raises(ValueError, match="expected"):
        retrieval_quality([[1.0]], [[1.0]], [[0]], ["p", "q"])
    with pytest.raises(ValueError, match="nearest of tfidf: a neighbour is outside"):
        retrieval_quality([[1.0]], [[1.0]], [[0]], ["p"], others={"tfidf": [[2]]})


def test_three_hundred_by_ten_thousand() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (300, 12)), rng.integers(0, 2, (10_000, 12))
    result = retrieval_quality(a, b, rng.integers(0, 10_000, (300, 10)), np.arange(300))
    assert result["jaccard_at_1"]["low"] < result["jaccard_random"] < result["jaccard_at_1"]["high"]


def test_common_labels_ignores_case_and_order() -> None:
    names, a, b = common_labels(["Nodule", "effusion", "mass"], [[1, 0, -1]], ["mass ", "nodule"], [[0, 1], [1, 0]])
    assert names == ["Nodule", "mass"]
    assert a.tolist() == [[1, -1]]
    assert b.tolist() == [[1, 0], [0, 1]]
    names, a, b = common_labels(["x"], [[1]], ["y"], [[1]])
    assert (names, a.shape, b.shape) == ([], (1, 0), (1, 0))


def test_ranks_by_hand() -> None:
    similarity = np.array([[0.9, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.1], [0.2, 0.2, 0.2, 0.2], [1, 2, 3, 4]])
    ranks = best_ranks(similarity, np.eye(4), ["a", "b", "c", "z"], ["a", "b", "a", "c"])
    # against the unit vectors, similarities are the queries' own features
    # b is behind one image of a and before the other; c ties with all and loses; z has no positive
    assert ranks[:3].tolist() == [1, 2, 4]
    assert math.isnan(ranks[3])
    result = recall_at_k(similarity, np.eye(4), ["a", "b", "c", "z"], ["a", "b", "a", "c"], ks=(1, 2, 4))
    assert result == {
        "recall_at_1": pytest.approx(1 / 3),
        "recall_at_2": pytest.approx(2 / 3),
        "recall_at_4": 1.0,
        "median_rank": 2.0,
        "queries": 3,
    }
    assert recall_at_k(np.zeros((1, 1)), np.ones((1, 1)), ["a"], ["b"])["median_rank"] is None
    with pytest.raises(ValueError, match="NaN"):
        best_ranks([[np.nan]], [[1.0]], ["a"], ["a"])
    with pytest.raises(ValueError, match="expected"):
        best_ranks([[1.0]], [[1.0]], ["a", "b"], ["a"])


def test_duplicates_do_not_push_each_other_down() -> None:
    rng = np.random.default_rng(1)
    studies = np.repeat(np.arange(12), 3)
    similarity = rng.normal(size=(36, 36))
    for query, rank in enumerate(best_ranks(similarity, np.eye(36), studies, studies)):
        order = np.argsort(-similarity[query])
        others = list(itertools.takewhile(lambda j, q=query: studies[j] != studies[q], order))
        assert rank == len(others) + 1
