"""Report to volume and volume to report: recall@k and median rank over the studies of a split.

There is one row per study: its reconstructions are averaged and its report counts once. Studies with the same report text
(ignoring case and white space; mostly normal studies) cannot be distinguished by text. Each is a right answer for the others
and does not lower their rank. `strict_*` accepts the query's own study only, and ties count against it.

The ranks are ours: torchmetrics' retrieval metrics hold every pair of query and candidate, and order ties arbitrarily.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctx_distill.metrics.bootstrap import Groups, bootstrap, bootstrap_mean
from ctx_distill.metrics.retrieval import random_hit
from ctx_distill.metrics.score_blocks import Candidates, Floats, ScoreBlock

RANKS = (1, 5, 10, 50, 100)
DIRECTIONS = ("report_to_volume", "volume_to_report")


def report_retrieval(
    image: ArrayLike, text: ArrayLike, reports: Sequence[str], patients: Groups, seed: int = 0, n: int = 1000
) -> tuple[dict[str, Any], dict[str, dict[str, Floats]]]:
    """Return the quality of both directions, with intervals over patients (queries are resampled, the pool is fixed).

    Collective: the ranks of a run share the queries. Similarities are computed in blocks (`metrics/score_blocks.py`).

    Args:
        image: (S, D) unit rows, one per study.
        text: (S, D) unit rows.
        reports: S texts, none empty.
        patients: S patient ids.
        seed: seed of the bootstrap.
        n: number of replicates.

    Returns:
        (`studies`, `identical_reports` (studies that share theirs with another), and by direction `recall_at_k`,
        `recall_at_k_random`, `median_rank`, `strict_recall_at_k`, `strict_median_rank`; recall@k is None where there are
        fewer than k studies, since it would be 1; by direction `rank` and `strict_rank` (S,), and `nearest` (S,), the
        place of the first study).
    """
    x, t = np.asarray(image, dtype=np.float64), np.asarray(text, dtype=np.float64)
    group = np.unique([" ".join(report.lower().split()) for report in reports], return_inverse=True)[1].reshape(-1)
    alike = np.bincount(group)[group].astype(np.float64)
    metrics: dict[str, Any] = {"studies": len(x), "identical_reports": int((alike > 1).sum())}
    ranks: dict[str, dict[str, Floats]] = {}
    for direction, queries, pool in zip(DIRECTIONS, (t, x), (x, t), strict=True):
        found = Candidates(pool).of_all(queries, functools.partial(_block_ranks, group=group))
        names = ("rank", "strict_rank", "nearest")
        ranks[direction] = {name: np.concatenate([np.zeros(0), *(part[name] for part in found)]) for name in names}
        told: dict[str, Any] = {}
        for prefix in ("", "strict_"):
            rank = ranks[direction][f"{prefix}rank"]
            for k in RANKS:
                hits = (rank <= k).astype(np.float64)
                enough = k <= len(x)
                told[f"{prefix}recall_at_{k}"] = bootstrap_mean(hits, patients, n, seed).as_json() if enough else None
                if not prefix:
                    told[f"recall_at_{k}_random"] = float(random_hit(alike, len(x), k).mean()) if enough else None
            median = functools.partial(_median, rank)
            told[f"{prefix}median_rank"] = bootstrap(median, patients, n, seed).as_json()
        metrics[direction] = told
    return metrics, ranks


def _block_ranks(block: ScoreBlock, group: NDArray[np.intp]) -> dict[str, Floats]:
    """Return `rank`, `strict_rank` and `nearest` (n,) of a block of studies whose reports have groups (S,)."""
    studies = np.arange(len(group))
    return {
        "rank": block.ranks(group[block.rows, None] == group),
        "strict_rank": block.ranks(studies[block.rows, None] == studies),
        "nearest": block.nearest().astype(np.float64),
    }


def _median(rank: Floats, rows: NDArray[np.intp]) -> float:
    return float(np.median(rank[rows]))
