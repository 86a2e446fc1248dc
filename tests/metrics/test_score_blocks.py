"""Ranks and nearest candidates against a brute force in exact sums: any block size, any number of ranks, ties included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ctx_distill.metrics.report_baselines import nearest_reports
from ctx_distill.metrics.report_retrieval import report_retrieval
from ctx_distill.metrics.retrieval import best_ranks
from ctx_distill.metrics.score_blocks import Candidates, ScoreBlock

DIM = 96
Floats = np.ndarray[Any, np.dtype[np.float64]]


def features() -> tuple[Floats, Floats, np.ndarray[Any, Any]]:
    """60 queries and candidates; 30 candidates are copies of five, whose scores with a query are equal."""
    rng = np.random.default_rng(7)
    queries, candidates = rng.normal(size=(60, DIM)), rng.normal(size=(60, DIM))
    for place in range(30):
        candidates[(7 * place) % 60] = candidates[5 + place % 5]
    studies = np.arange(60) // 2
    studies[40:] = 39
    return queries, candidates, studies


def exact(queries: Floats, candidates: Floats) -> Floats:
    """Inner products, each rounded once."""
    return np.array([[math.fsum(x * y for x, y in zip(q, c, strict=True)) for c in candidates] for q in queries])


def oracle_ranks(scores: Floats, asked: Any, studies: Any) -> list[float]:
    ranks = []
    for row, study in zip(scores, asked, strict=True):
        best = max((score for score, other in zip(row, studies, strict=True) if other == study), default=None)
        others = [score for score, other in zip(row, studies, strict=True) if other != study]
        ranks.append(math.nan if best is None else 1.0 + sum(score >= best for score in others))
    return ranks


@pytest.mark.parametrize("cells", [1, 60, 7 * 60 + 5, 59 * 60, 10**9])
def test_ranks_do_not_depend_on_the_block(cells: int) -> None:
    queries, candidates, studies = features()
    asked = studies.copy()
    asked[3] = 1000  # no positive
    expected = oracle_ranks(exact(queries, candidates), asked, studies)
    assert len({rank for rank in expected if rank == rank}) > 10
    np.testing.assert_array_equal(best_ranks(queries, candidates, asked, studies, cells), expected)
    turned = np.random.default_rng(cells).permutation(60)
    found = best_ranks(queries, candidates[turned], asked, studies[turned], cells)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("cells", [1, 11 * 60, 10**9])
def test_the_first_of_equal_candidates_is_nearest(cells: int) -> None:
    queries, candidates, _ = features()
    sizes: list[int] = []

    def nearest(block: ScoreBlock) -> list[int]:
        sizes.append(block.rows.stop - block.rows.start)
        places: list[int] = block.nearest().tolist()
        return places

    found = [place for block in Candidates(candidates).of_all(queries, nearest, cells) for place in block]
    assert max(sizes) == max(1, min(60, cells // 60))
    expected = [row.tolist().index(row.max()) for row in exact(queries, candidates)]
    assert found == expected
    names = [f"report {place}" for place in range(60)]
    assert nearest_reports(queries, candidates, names) == [names[place] for place in expected]


def test_a_hundred_copies_all_tie() -> None:
    """More close scores than are computed one by one, and a product that may round each copy's otherwise."""
    rng = np.random.default_rng(0)
    candidates = np.repeat(rng.normal(size=(3, DIM)), [150, 100, 1], axis=0)
    queries = rng.normal(size=(20, DIM))
    ranks = best_ranks(queries, candidates, np.arange(20), np.arange(len(candidates)))
    first = exact(queries, candidates[[0, 150, 250]])
    expected = [150 + 100 * (row[1] > row[0]) + (row[2] > row[0]) for row in first]
    assert ranks.tolist() == expected


def test_a_vector_that_points_nowhere_ties_with_all() -> None:
    assert best_ranks(np.zeros((1, 3)), np.eye(3), [0], [0, 1, 2]).tolist() == [3]


def ranks_share(queries: torch.Tensor, candidates: torch.Tensor, studies: torch.Tensor) -> dict[str, Any]:
    """What each rank gets of the collective functions."""
    x, y, codes = queries.numpy(), candidates.numpy(), studies.numpy()
    reports = [f"report {code}" for code in codes]
    metrics, ranks = report_retrieval(x, y, reports, codes, n=20)
    return {
        "best": torch.from_numpy(best_ranks(x, y, codes, codes)),
        "nearest": nearest_reports(x[:7], y, [str(place) for place in range(len(y))]),
        "metrics": metrics,
        "ranks": {direction: {n: torch.from_numpy(v) for n, v in found.items()} for direction, found in ranks.items()},
    }


@pytest.mark.ddp
def test_two_ranks_share_the_queries(pool: Callable[[int], Any]) -> None:
    given = dict(zip(("queries", "candidates", "studies"), map(torch.from_numpy, features()), strict=True))
    given = {name: value[:59] for name, value in given.items()}  # one rank has a query less
    alone = ranks_share(**given)
    for rank in pool(2).run(__file__, "ranks_share", given):
        assert torch.equal(rank["best"], alone["best"])
        assert rank["nearest"] == alone["nearest"]
        assert rank["metrics"] == alone["metrics"]
        for direction, found in alone["ranks"].items():
            for name, value in found.items():
                assert torch.equal(rank["ranks"][direction][name], value)
