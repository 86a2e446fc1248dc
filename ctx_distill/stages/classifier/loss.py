"""Losses of a multi-label findings head, with one term per label, and mixup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ctx_distill.errors import InputError


@dataclass(frozen=True)
class LossSettings:
    """Settings of the findings loss.

    Attributes:
        kind: `weighted` multiplies the terms of positives by negatives / positives in `train`, clamped to 1 ... 10;
            `plain` uses no weights; `focal` (Lin et al. 2017) down-weights easy labels.
        gamma: Focusing parameter of `focal`: terms are multiplied by (1 - p_t)^gamma.
        alpha: Weight of positives in `focal`; negatives have 1 - alpha. None weights both by 1.
        mixup: Parameter a of Beta(a, a) (Zhang et al. 2018), which mixes volumes and labels within a rank's batch; 0
            disables it.

    Raises:
        InputError: a value out of range.
    """

    kind: Literal["weighted", "plain", "focal"] = "weighted"
    gamma: float = 2.0
    alpha: float | None = None
    mixup: float = 0.0

    def __post_init__(self) -> None:
        if self.gamma < 0 or self.mixup < 0 or not (self.alpha is None or 0 <= self.alpha <= 1):
            raise InputError(
                f"classifier: loss.gamma is {self.gamma}, loss.alpha {self.alpha} and loss.mixup {self.mixup}; expected"
                " gamma and mixup of 0 or more, and alpha from 0 to 1 or null."
            )


def findings_terms(logits: Tensor, targets: Tensor, settings: LossSettings, positive_weight: Tensor) -> Tensor:
    """Return the weighted cross-entropy of each label.

    Args:
        logits: (B, F).
        targets: (B, F) in [0, 1]; fractional for mixed rows.
        settings: Kind of loss.
        positive_weight: (F,), used by `weighted`.

    Returns:
        (B, F).
    """
    if settings.kind == "weighted":
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=positive_weight, reduction="none")
    terms = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if settings.kind == "plain":
        return terms
    probability = logits.sigmoid()
    right = probability * targets + (1 - probability) * (1 - targets)
    terms = terms * (1 - right) ** settings.gamma
    if settings.alpha is None:
        return terms
    return terms * (settings.alpha * targets + (1 - settings.alpha) * (1 - targets))


def mixup(volume: Tensor, labels: Tensor, a: float, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mix each row with the next of its batch, and the last with the first: w x_i + (1 - w) x_{i+1}, w ~ Beta(a, a).

    A label that is unknown (neither 1 nor 0) in either row is NaN in the mixture.

    Args:
        volume: (B, ...).
        labels: (B, F).
        a: Above 0.
        seeds: B seeds; a row's weight depends on its seed only.

    Returns:
        Mixed volumes and labels, of the same shapes.
    """
    weights = torch.tensor([_beta(a, seed) for seed in seeds], dtype=volume.dtype, device=volume.device)
    known = torch.where((labels == 0) | (labels == 1), labels, torch.nan)
    column = weights.to(labels)[:, None]
    mixed = column * known + (1 - column) * known.roll(-1, 0)
    weights = weights.reshape(-1, *[1] * (volume.ndim - 1))
    return weights * volume + (1 - weights) * volume.roll(-1, 0), mixed


def _beta(a: float, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    return float(torch._sample_dirichlet(torch.tensor([[a, a]], dtype=torch.float64), generator)[0, 0])
