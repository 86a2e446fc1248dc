"""Means of an epoch that a checkpoint in its midst can hold; Lightning's own are lost with the process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class EpochMeans:
    """Weighted sums of named values since the last `drain`, in double precision, on the values' own device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, terms: dict[str, Tensor], weight: float) -> None:
        """Add a batch's values, () each; one that is not finite is left out, as the step that it belongs to is."""
        for name, value in terms.items():
            value = value.detach().double()
            finite = value.isfinite()
            part = torch.stack([value.where(finite, 0.0) * weight, finite * weight])
            self._sums[name] = self._sums[name].to(part.device) + part if name in self._sums else part

    def drain(self) -> dict[str, Tensor]:
        """The means, () float32 each; the sums begin anew."""
        means = {name: (value / weight).float() for name, (value, weight) in self._sums.items()}
        self._sums = {}
        return means

    def state(self) -> dict[str, Any]:
        """The sums, for a checkpoint."""
        return {name: value.cpu() for name, value in self._sums.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Take `state` back."""
        self._sums = dict(state)
