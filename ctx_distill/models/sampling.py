"""Sampling of reports that depends on a volume's seed alone, not on the batch or the rank that it is in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctx_distill.types import InputError


@dataclass(frozen=True)
class SamplingSettings:
    """How words are drawn.

    Attributes:
        temperature: logits are divided by it.
        top_p: share of the probability whose likeliest words are drawn from (Holtzman et al., arXiv 1904.09751).
        seed: of the draws.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    seed: int = 0


class GumbelNoise:
    """A logits processor after which the largest logit is a sample of the softmax (the Gumbel-max trick).

    Each row draws from a generator of its own, so that a report is the same in any company. argmax(logits + G), G standard
    Gumbel, is distributed as softmax(logits); what top-p has set to minus infinity stays out.

    Args:
        seeds: one a row.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) scores with their noise."""
        del input_ids
        drawn = torch.stack([torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self._generators])
        noise = -torch.log(-torch.log(drawn.clamp(1e-12, 1 - 1e-12)))
        return scores + noise.to(scores)


def sampling_steps(settings: SamplingSettings, seeds: Sequence[int] | None, beams: int) -> Any:
    """The logits processors of sampling, for a greedy search: temperature, top-p, noise.

    Args:
        settings: see there.
        seeds: one a row; joined with the settings' own.
        beams: must be 1.

    Raises:
        InputError: with beams, without seeds, or a temperature or a share out of range.
    """
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    if beams != 1 or seeds is None:
        raise InputError(
            f"sampling: {beams} beams and seeds {seeds}, expected 1 beam and one seed a report. Set beams: 1."
        )
    if settings.temperature <= 0 or not 0 < settings.top_p <= 1:
        raise InputError(
            f"sampling: temperature {settings.temperature} and top_p {settings.top_p}, expected a temperature above 0 and"
            " top_p in (0, 1]."
        )
    steps = LogitsProcessorList([TemperatureLogitsWarper(float(settings.temperature))])
    if settings.top_p < 1:
        steps.append(TopPLogitsWarper(settings.top_p))
    steps.append(GumbelNoise([settings.seed * 2_147_483_629 + seed for seed in seeds]))
    return steps
