"""Heads of a CT encoder: projection into an embedding space, and findings."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """P_d and P_a: (B, D_in) to (B, D_out), one linear layer, or two with GELU in between; not normalised.

    Attributes:
        config: JSON values from which the head is built.
    """

    def __init__(
        self, in_dim: int, out_dim: int, kind: Literal["linear", "mlp"] = "linear", hidden_dim: int = 0
    ) -> None:
        """Build the head.

        Args:
            in_dim: D_in.
            out_dim: D_out.
            kind: linear, or mlp preceded by layer norm.
            hidden_dim: width of the mlp; 0 for the max of both dimensions.
        """
        super().__init__()
        hidden_dim = hidden_dim or max(in_dim, out_dim)
        self.config = {"in_dim": in_dim, "out_dim": out_dim, "kind": kind, "hidden_dim": hidden_dim}
        self.net: nn.Module
        if kind == "linear":
            self.net = nn.Linear(in_dim, out_dim)
        else:
            self.net = nn.Sequential(
                nn.LayerNorm(in_dim), nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, out_dim)
            )

    def forward(self, features: Tensor) -> Tensor:
        """Project (B, D_in) to (B, D_out)."""
        out: Tensor = self.net(features)
        return out


class FindingsHead(nn.Module):
    """Layer norm and a linear layer to one logit per finding, for linear probes and fine-tuning."""

    def __init__(self, in_dim: int, num_findings: int, norm: bool = True) -> None:
        """Build the head.

        Args:
            in_dim: D_c.
            num_findings: F.
            norm: whether to use layer norm; a logistic regression has none.
        """
        super().__init__()
        self.norm: nn.Module = nn.LayerNorm(in_dim) if norm else nn.Identity()
        self.linear = nn.Linear(in_dim, num_findings)
        nn.init.zeros_(self.linear.bias)
        nn.init.normal_(self.linear.weight, std=0.01)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return logits (B, F) of (B, D_c), in the weights' dtype even under autocast, since bf16 causes tied scores."""
        device = pooled.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._logits(pooled.to(self.linear.weight.dtype))
        return self._logits(pooled)

    def _logits(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(pooled))
        return logits
