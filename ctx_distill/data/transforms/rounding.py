"""Quantise tensors to the int16 steps of prepared volumes, and convert them back to float.

A window of 2,000 HU in 65,534 steps has 0.03 HU per step: far below scanner noise, at half the size of float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 32767
"""Number of steps from the middle of the output range to either end."""


def to_steps(tensor: Tensor, output_range: tuple[float, float]) -> Tensor:
    """Round float32 values in `output_range` to the nearest int16 step, ties to even."""
    low, high = output_range
    middle, step = (low + high) / 2, (high - low) / 2 / STEPS
    return ((tensor - middle) / step).round_().clamp_(-STEPS, STEPS).to(torch.int16)


def from_steps(steps: Tensor, output_range: tuple[float, float], out: Tensor | None = None) -> Tensor:
    """Convert int16 steps to float32 in `output_range`, into `out` (same shape) if provided."""
    low, high = output_range
    out = torch.empty(steps.shape, dtype=torch.float32) if out is None else out
    out.copy_(steps).mul_((high - low) / 2 / STEPS)
    return out if low == -high else out.add_((low + high) / 2)
