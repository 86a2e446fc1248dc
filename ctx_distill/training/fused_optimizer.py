"""Torch's fused Adam and AdamW on a GPU: one kernel per step, which can leave a bad step out without the host waiting for it."""

from __future__ import annotations

import torch
from torch.optim import Adam, AdamW, Optimizer

FUSED_DEVICES = ("cuda",)
"""On a CPU torch's default is as fast, and the host waits for nothing."""


def fused_on(device: torch.device, optimizer: Optimizer) -> Optimizer:
    """Return the optimizer with fused kernels where `device` has them and the settings leave it open.

    Args:
        device: of the parameters.
        optimizer: one that has not made a step. Adam and AdamW are made again with `fused=True`, unless their settings name
            `fused`, `foreach`, `capturable` or `differentiable`; others stay as they are.
    """
    given = optimizer.defaults
    chosen = any(given.get(name) is not None for name in ("fused", "foreach"))
    if type(optimizer) not in (Adam, AdamW) or device.type not in FUSED_DEVICES or chosen:
        return optimizer
    if given.get("capturable") or given.get("differentiable"):
        return optimizer
    groups = [
        {name: value for name, value in group.items() if name not in ("fused", "foreach")}
        for group in optimizer.param_groups
    ]
    fused = AdamW if isinstance(optimizer, AdamW) else Adam
    return fused(groups, fused=True)
