"""Sample reports from a seed per volume, independent of batch and rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctx_distill.types import InputError


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of token sampling.

    Attributes:
        temperature: divisor of the logits.
        top_p: cumulative probability of the most likely tokens to sample from (Holtzman et al., arXiv 1904.09751).
        seed: seed of the sampling.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    seed: int = 0


class GumbelNoise:
    """Logits processor that makes the max logit a sample of the softmax (Gumbel-max trick).

    Each row has its own generator, so that a report is independent of the batch. argmax(logits + G), with G standard
    Gumbel, is distributed as softmax(logits); tokens that top-p has set to minus infinity are never selected.

    Args:
        seeds: one seed per row.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores (B, V) with noise."""
        del input_ids
        drawn = torch.stack([torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self._generators])
        noise = -torch.log(-torch.log(drawn.clamp(1e-12, 1 - 1e-12)))
        return scores + noise.to(scores)


def sampling_steps(settings: SamplingSettings, seeds: Sequence[int] | None, beams: int) -> Any:
    """Return the logits processors that turn greedy search into sampling: temperature, top-p, noise.

    Args:
        settings: sampling settings.
        seeds: one seed per row, combined with the seed of the settings.
        beams: must be 1.

    Raises:
        InputError: several beams, no seeds, or an invalid temperature or top_p.
    """
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    if beams != 1 or seeds is None:
        raise InputError(
            f"sampling: {beams} beams and seeds {seeds}; expected 1 beam and one seed per report. Set beams: 1."
        )
    if settings.temperature <= 0 or not 0 < settings.top_p <= 1:
        raise InputError(
            f"sampling: temperature {settings.temperature} and top_p {settings.top_p}; expected a temperature above 0 and"
            " top_p in (0, 1]."
        )
    steps = LogitsProcessorList([TemperatureLogitsWarper(float(settings.temperature))])
    if settings.top_p < 1:
        steps.append(TopPLogitsWarper(settings.top_p))
    steps.append(GumbelNoise([settings.seed * 2_147_483_629 + seed for seed in seeds]))
    return steps
