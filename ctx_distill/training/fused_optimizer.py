"""Use torch's fused Adam and AdamW on a GPU: one kernel per step, which can skip a bad step without synchronisation."""

from __future__ import annotations

import torch
from torch.optim import Adam, AdamW, Optimizer

FUSED_DEVICES = ("cuda",)
"""On a CPU, torch's default is as fast and needs no synchronisation."""


def fused_on(device: torch.device, optimizer: Optimizer) -> Optimizer:
    """Return the optimizer with fused kernels, if `device` supports them and the settings do not choose otherwise.

    Args:
        device: Device of the parameters.
        optimizer: An optimizer before its first step. Adam and AdamW are recreated with `fused=True`, unless `fused`,
            `foreach`, `capturable` or `differentiable` is set. Other optimizers are returned unchanged.
    """
    defaults = optimizer.defaults
    chosen = any(defaults.get(name) is not None for name in ("fused", "foreach"))
    if type(optimizer) not in (Adam, AdamW) or device.type not in FUSED_DEVICES or chosen:
        return optimizer
    if defaults.get("capturable") or defaults.get("differentiable"):
        return optimizer
    groups = [
        {name: value for name, value in group.items() if name not in ("fused", "foreach")}
        for group in optimizer.param_groups
    ]
    fused = AdamW if isinstance(optimizer, AdamW) else Adam
    return fused(groups, fused=True)
