"""Metrics that Lightning logs per epoch: every rank adds its rows, and torchmetrics gathers them before the value is computed."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat

from ctx_distill.metrics.retrieval import recall_at_k


class MacroAUROC(Metric):
    """The mean AUROC over the findings that have both classes; NaN if there are none.

    torchmetrics' `MultilabelAUROC` counts a finding without both classes as 0. Here it is excluded, as in `macro_auroc`.
    """

    full_state_update = False
    higher_is_better = True
    probability: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("probability", "labels"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, probability: Tensor, labels: Tensor) -> None:
        """Add rows.

        Args:
            probability: (b, F) in [0, 1].
            labels: (b, F) of 1, 0, -1 or NaN.
        """
        self.probability.append(probability.float())
        self.labels.append(labels.float())

    def compute(self) -> Tensor:
        """Return the mean, ()."""
        probability, labels = dim_zero_cat(self.probability), dim_zero_cat(self.labels)
        values = []
        for scores, column in zip(probability.T, labels.T, strict=True):
            known = (column == 0) | (column == 1)
            target = column[known].long()
            if target.any() and not target.all():
                values.append(binary_auroc(scores[known], target))
        return torch.stack(values).mean() if values else torch.full((), float("nan"), device=labels.device)


class ReportRecall(Metric):
    """The share of reports whose own study is among the `k` nearest volumes.

    torchmetrics' `RetrievalHitRate` holds every pair of report and volume and orders equal scores arbitrarily. `recall_at_k`
    holds a block of pairs, and equal scores count against the query.

    Args:
        k: number of volumes.
    """

    full_state_update = False
    higher_is_better = True
    image: list[Tensor]
    text: list[Tensor]
    study: list[Tensor]

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        for name in ("image", "text", "study"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, image: Tensor, text: Tensor, study: Tensor) -> None:
        """Add rows.

        Args:
            image: (b, D) unit rows.
            text: (b, D) unit rows of their reports.
            study: (b,) codes.
        """
        self.image.append(image.float())
        self.text.append(text.float())
        self.study.append(study)

    def compute(self) -> Tensor:
        """Return the share, ()."""
        image, text, study = (dim_zero_cat(part).cpu() for part in (self.image, self.text, self.study))
        recall = recall_at_k(text.numpy(), image.numpy(), study.numpy(), study.numpy(), ks=(self.k,))
        value = recall[f"recall_at_{self.k}"]
        return torch.tensor(float("nan") if value is None else value)
