"""What is known of the step at which a run gave up, in `FOLDER/fault/`.

`step-<n>.json`: loss and manifest rows of every rank (one entry a batch of an accumulated step), gradient norm,
learning rate a parameter group, the last good norms, and the parameters whose gradient or weight is not finite.
`step-<n>-rank-<r>.safetensors`: the tensors of each rank's last batch, as the task got them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from safetensors.torch import save
from torch import Tensor
from torch.distributed.tensor import DTensor

from ctx_distill.distributed import gather_objects, rank
from ctx_distill.files import write_bytes, write_json


@dataclass(frozen=True)
class Fault:
    """A bad step as one rank saw it.

    Attributes:
        step: optimiser steps before it.
        epoch: which, from 0.
        losses: of this rank's batches.
        norm: of the gradient, over all ranks.
        rates: the learning rate of each parameter group.
        norms: of the last good gradients, oldest first.
        rows: manifest rows of each of this rank's batches.
    """

    step: int
    epoch: int
    losses: list[float]
    norm: float
    rates: list[float]
    norms: list[float]
    rows: list[list[int]]


def write_fault(root: Path, module: L.LightningModule, batch: Any, fault: Fault) -> str:
    """Write both files; every rank calls it.

    Args:
        root: the folder in which `fault/` is made.
        module: whose parameters are looked through; gradients still in place.
        batch: this rank's.
        fault: what else is known.

    Returns:
        A sentence for the error, the same on every rank: where the dump is, or why there is none.
    """
    path = root / "fault" / f"step-{fault.step}.json"
    tensors = path.with_name(f"{path.stem}-rank-{rank()}.safetensors")
    bad = {
        "gradients": [name for name, parameter in module.named_parameters() if not _is_finite(parameter.grad)],
        "weights": [name for name, parameter in module.named_parameters() if not _is_finite(parameter)],
    }
    trouble = _attempt(lambda: write_bytes(tensors, save({name: _plain(x) for name, x in _tensors("batch", batch)})))
    mine = {"rank": rank(), "losses": list(map(_json, fault.losses)), "rows": fault.rows, "tensors": tensors.name}
    ranks = gather_objects([(mine, bad, trouble)])
    if rank() == 0:
        record = {
            "step": fault.step,
            "epoch": fault.epoch,
            "gradient_norm": _json(fault.norm),
            "learning_rate": fault.rates,
            "ranks": [each for each, _, _ in ranks],
            "last_norms": fault.norms,
            "not_finite": {kind: sorted({name for _, each, _ in ranks for name in each[kind]}) for kind in bad},
        }
        trouble = trouble or _attempt(lambda: write_json(path, record))
    troubles = [each for each in gather_objects([trouble]) if each]
    return f"No whole dump in {path}: {troubles[0]}." if troubles else f"Dump: {path}."


def _attempt(write: Callable[[], None]) -> str:
    """Why a file could not be written; the fault is worth more than the file."""
    try:
        write()
    except OSError as error:
        return str(error)
    return ""


def _is_finite(tensor: Tensor | None) -> bool:
    if tensor is None:
        return True
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(local.isfinite().all())


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch and where in it each lies."""
    if isinstance(value, Tensor):
        yield name, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(field.name, getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(str(key), part)
    elif isinstance(value, (list, tuple)):
        for place, part in enumerate(value):
            yield from _tensors(f"{name}.{place}", part)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _json(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)
