"""The metrics that Lightning logs: two ranks against one, scikit-learn and torchmetrics' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torchmetrics.retrieval import RetrievalHitRate

from ctx_distill.distributed import rank, world_size
from ctx_distill.metrics.classification import macro_auroc
from ctx_distill.metrics.gathered import MacroAUROC, ReportRecall


def findings_of_ranks(rows: int = 41) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities with ties and labels: uncertain and blank ones, and one finding without a positive."""
    rng = np.random.default_rng(3)
    labels = rng.choice([0.0, 1.0, -1.0, np.nan], p=[0.4, 0.4, 0.1, 0.1], size=(rows, 3))
    labels[:, 2] = np.where(labels[:, 2] == 1, 0, labels[:, 2])
    return torch.from_numpy(np.round(rng.random((rows, 3)), 1)), torch.from_numpy(labels)


def rank_of_macro_auroc() -> float:
    """Every rank adds its rows in uneven batches; the last rank adds an empty one."""
    metric = MacroAUROC()
    local = [part[rank() :: world_size()] for part in findings_of_ranks()]
    for start in (0, 5, 100):
        metric.update(*(part[start : start + 95 if start else 5] for part in local))
    return float(metric.compute())


@pytest.mark.ddp
def test_two_ranks_give_the_macro_auroc_of_one(pool: Callable[[int], Any]) -> None:
    scores, labels = (part.numpy() for part in findings_of_ranks())
    known = [np.isin(labels[:, f], (0, 1)) for f in range(2)]
    expected = np.mean([roc_auc_score(labels[known[f], f], scores[known[f], f]) for f in range(2)])
    assert rank_of_macro_auroc() == pytest.approx(expected, abs=1e-6)
    assert macro_auroc(labels, scores) == pytest.approx(expected, abs=1e-6)
    assert pool(2).run(__file__, "rank_of_macro_auroc", {}) == [rank_of_macro_auroc()] * 2


def test_macro_auroc_of_one_finding_and_of_none() -> None:
    metric = MacroAUROC()
    metric.update(torch.tensor([[0.1], [0.9], [0.5]]), torch.tensor([[0.0], [1.0], [-1.0]]))
    assert float(metric.compute()) == 1.0
    metric.reset()
    metric.update(torch.tensor([[0.1]]), torch.tensor([[0.0]]))
    assert np.isnan(float(metric.compute()))


def rank_of_recall() -> float:
    torch.manual_seed(1)
    image, text = (F.normalize(torch.randn(37, 8), dim=-1) for _ in range(2))
    study, metric = torch.arange(37), ReportRecall(5)
    metric.update(*(part[rank() :: world_size()] for part in (image, F.normalize(image + 2 * text, dim=-1), study)))
    return float(metric.compute())


@pytest.mark.ddp
def test_two_ranks_give_the_recall_of_one_and_of_torchmetrics(pool: Callable[[int], Any]) -> None:
    torch.manual_seed(1)
    image, text = (F.normalize(torch.randn(37, 8), dim=-1) for _ in range(2))
    scores = F.normalize(image + 2 * text, dim=-1) @ image.T
    queries = torch.arange(37)[:, None].expand(37, 37)
    expected = float(RetrievalHitRate(top_k=5)(scores, torch.eye(37, dtype=torch.bool), queries))
    assert 0 < expected < 1
    assert rank_of_recall() == pytest.approx(expected, abs=1e-6)
    assert pool(2).run(__file__, "rank_of_recall", {}) == [rank_of_recall()] * 2


def test_equal_scores_count_against_the_query() -> None:
    metric = ReportRecall(5)
    metric.update(torch.ones(8, 2), torch.ones(8, 2), torch.arange(8))
    assert float(metric.compute()) == 0.0
