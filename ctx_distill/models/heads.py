"""Heads on a CT encoder: projections into an embedding space, and findings."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """P_d and P_a: (B, D_in) to (B, D_out), one linear layer or two with GELU between; not normalised.

    Attributes:
        config: plain JSON values to build it again.
    """

    def __init__(
        self, in_dim: int, out_dim: int, kind: Literal["linear", "mlp"] = "linear", hidden_dim: int = 0
    ) -> None:
        """Build it.

        Args:
            in_dim: D_in.
            out_dim: D_out.
            kind: linear, or mlp with layer norm in front.
            hidden_dim: of the mlp; 0 for the larger of both dimensions.
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
        """(B, D_in) to (B, D_out)."""
        out: Tensor = self.net(features)
        return out


class FindingsHead(nn.Module):
    """Layer norm and one linear layer to a logit a finding: the linear probe and the head of fine-tuning."""

    def __init__(self, in_dim: int, num_findings: int, norm: bool = True) -> None:
        """Build it.

        Args:
            in_dim: D_c.
            num_findings: F.
            norm: whether there is a layer norm; a logistic regression has none.
        """
        super().__init__()
        self.norm: nn.Module = nn.LayerNorm(in_dim) if norm else nn.Identity()
        self.linear = nn.Linear(in_dim, num_findings)
        nn.init.zeros_(self.linear.bias)
        nn.init.normal_(self.linear.weight, std=0.01)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, D_c) to logits (B, F), in the weights' own type also under autocast: in bf16 the scores of studies tie."""
        device = pooled.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._logits(pooled.to(self.linear.weight.dtype))
        return self._logits(pooled)

    def _logits(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(pooled))
        return logits
