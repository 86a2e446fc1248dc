"""Means of an epoch that a checkpoint in its midst can hold; Lightning's own are lost with the process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class EpochMeans:
    """Weighted sums of named values since the last `drain`, in double precision, on the values' own device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, terms: dict[str, Tensor], weight: float) -> None:
        """Add a batch's values, () each."""
        for name, value in terms.items():
            part = value.detach().double() * weight
            self._sums[name] = self._sums[name].to(part.device) + part if name in self._sums else part
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def drain(self) -> dict[str, Tensor]:
        """The means, () float32 each; the sums begin anew."""
        means = {name: (value / self._weights[name]).float() for name, value in self._sums.items()}
        self._sums, self._weights = {}, {}
        return means

    def state(self) -> dict[str, Any]:
        """The sums, for a checkpoint."""
        return {"sums": {name: value.cpu() for name, value in self._sums.items()}, "weights": dict(self._weights)}

    def load(self, state: dict[str, Any]) -> None:
        """Take `state` back."""
        self._sums = {name: torch.as_tensor(value) for name, value in state["sums"].items()}
        self._weights = dict(state["weights"])
