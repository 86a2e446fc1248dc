"""Write `FOLDER/fault/step-<n>.json` about the step at which a run failed.

It contains the loss and manifest rows of every rank (one entry per batch of an accumulated step), the gradient norm, the
learning rate per parameter group, the last finite norms, and the parameters with a non-finite gradient or weight. The
rows suffice to reproduce the batch, because a row's random draws depend on seed, epoch and row only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from torch import Tensor
from torch.distributed.tensor import DTensor

from ctx_distill.distributed import gather_objects, rank
from ctx_distill.files import write_json


@dataclass(frozen=True)
class FaultRecord:
    """A bad step as one rank saw it.

    Attributes:
        step: Optimiser steps before it.
        epoch: Epoch, from 0.
        losses: Losses of this rank's batches.
        norm: Norm of the gradient, over all ranks.
        rates: Learning rate of each parameter group.
        norms: Norms of the last finite gradients, oldest first.
        rows: Manifest rows of each of this rank's batches.
    """

    step: int
    epoch: int
    losses: list[float]
    norm: float
    rates: list[float]
    norms: list[float]
    rows: list[list[int]]


def write_fault(root: Path, module: L.LightningModule, fault: FaultRecord) -> str:
    """Write the file; must be called on every rank.

    Args:
        root: The folder in which `fault/` is created.
        module: The module to inspect, with its gradients.
        fault: The bad step.

    Returns:
        A sentence for the error message, the same on every rank: the path of the dump, or why it could not be written.
    """
    path = root / "fault" / f"step-{fault.step}.json"
    bad = {
        "gradients": [name for name, parameter in module.named_parameters() if not _is_finite(parameter.grad)],
        "weights": [name for name, parameter in module.named_parameters() if not _is_finite(parameter)],
    }
    ranks = gather_objects([({"rank": rank(), "losses": list(map(_json, fault.losses)), "rows": fault.rows}, bad)])
    trouble = ""
    if rank() == 0:
        record = {
            "step": fault.step,
            "epoch": fault.epoch,
            "gradient_norm": _json(fault.norm),
            "learning_rate": fault.rates,
            "ranks": [each for each, _ in ranks],
            "last_norms": fault.norms,
            "not_finite": {kind: sorted({name for _, each in ranks for name in each[kind]}) for kind in bad},
        }
        try:
            write_json(path, record)
        except OSError as error:  # the error of the run matters more than the file
            trouble = str(error)
    troubles = [each for each in gather_objects([trouble]) if each]
    return f"No dump in {path}: {troubles[0]}." if troubles else f"Dump: {path}."


def _is_finite(tensor: Tensor | None) -> bool:
    if tensor is None:
        return True
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(local.isfinite().all())


def _json(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)
