"""Epoch means that can be checkpointed in mid-epoch, unlike Lightning's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class EpochMeans:
    """Weighted sums of named values since the last `drain`, in double precision, on the device of the values."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, terms: dict[str, Tensor], weight: float) -> None:
        """Add a batch's values, () each; non-finite ones are skipped, like the steps they belong to."""
        for name, value in terms.items():
            value = value.detach().double()
            finite = value.isfinite()
            part = torch.stack([value.where(finite, 0.0) * weight, finite * weight])
            self._sums[name] = self._sums[name].to(part.device) + part if name in self._sums else part

    def drain(self) -> dict[str, Tensor]:
        """Return the means, () float32 each, and reset the sums."""
        means = {name: (value / weight).float() for name, (value, weight) in self._sums.items()}
        self._sums = {}
        return means

    def state(self) -> dict[str, Any]:
        """Return the sums for a checkpoint."""
        return {name: value.cpu() for name, value in self._sums.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore `state`."""
        self._sums = dict(state)
