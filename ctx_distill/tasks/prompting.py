"""Findings prompts as directions in a joint space, and the probability that a pair of prompts gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ctx_distill.text.prompts import prompt_pairs


@torch.no_grad()
def prompt_features(
    encode: Callable[[list[str]], Tensor], findings: Sequence[str], templates: Literal["default", "ensemble"]
) -> tuple[Tensor, Tensor]:
    """Mean text features of each finding's positive and negative prompts.

    Args:
        encode: B texts to (B, D) unit rows.
        findings: F names.
        templates: which prompts.

    Returns:
        Positive and negative (F, D), unit rows.
    """
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for finding in findings:
        for side, prompts in zip(sides, prompt_pairs(finding, templates=templates), strict=True):
            side.append(F.normalize(encode(prompts).mean(dim=0), dim=-1))
    return torch.stack(sides[0]), torch.stack(sides[1])


def pair_probabilities(image: Tensor, positive: Tensor, negative: Tensor, logit_scale: float) -> Tensor:
    """softmax over each pair of prompts: probability that the finding is present.

    Args:
        image: (N, D), unit rows.
        positive: (F, D).
        negative: (F, D).
        logit_scale: 1 / temperature.

    Returns:
        (N, F) in [0, 1].
    """
    return torch.sigmoid(logit_scale * (image @ positive.T - image @ negative.T))
