"""Skip and count optimiser steps with a non-finite loss or gradient, and stop a run that has too many in a row.

All ranks must make the same decision, or their weights diverge. The decision depends on the norm of the gradients that the
optimizer is about to use, which DDP has averaged over the ranks (with sharded parameters, the norm is summed over them). A
non-finite loss on one rank reaches the others through its gradient, so no collective is needed.

On a GPU the decision needs no synchronisation. The step is skipped on the device by `found_inf`, as `torch.amp.GradScaler`
does for fused optimizers, and the norms are read every `READ_EVERY` steps. Optimizers without this support synchronise
once per step; `training.fused_optimizer` adds it to Adam and AdamW.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import SGD, Optimizer

from ctx_distill.distributed import rank
from ctx_distill.errors import InputError
from ctx_distill.training.callbacks.fault_dump import FaultRecord, write_fault

READ_EVERY = 10
"""Steps between two readings of norms on a GPU; on a CPU they are read in every step."""
LAST_NORMS = 10
"""Number of finite norms in the dump."""


@dataclass(frozen=True)
class _Step:
    """One optimiser step whose norm has not been read yet; tensors are on the device.

    Attributes:
        number: Optimiser steps before it.
        norm: (), gradient norm over all ranks, before clipping.
        scale: (), scale of the GradScaler, or None.
        losses: () per batch of the accumulated step, before backward.
        rows: (b,) manifest rows per batch.
    """

    number: int
    norm: Tensor
    scale: Tensor | None
    losses: list[Tensor]
    rows: list[Tensor | None]


class LossGuard(L.Callback):
    """Skip optimiser steps whose loss or gradient is NaN or infinite. A finite step is never skipped.

    A skipped step changes neither the weights, nor the optimizer's state (moments, step count, weight decay), nor the
    running statistics of batch norms. Step counters, learning-rate schedules and data advance. With gradient
    accumulation, one bad batch skips the complete step. A run without bad steps is bit-identical to one without the guard.

    With a GradScaler (`16-mixed`), the scaler skips the steps. They are counted, but only count as consecutive bad steps
    once the scale is down to 1, because at a larger scale skipped steps are part of finding the scale.

    Args:
        largest_skips: Consecutive bad steps after which the run fails.

    Attributes:
        skipped: Skipped steps of the run so far; `train/skipped_steps` is per epoch.
        clipped: Steps of the run so far whose gradient was clipped by norm; `train/clipped_steps` is per epoch.
        largest: Maximum finite gradient norm of the epoch so far, before clipping; `train/largest_gradient_norm`.

    Raises:
        InputError: After `largest_skips` consecutive bad steps, on every rank (on a GPU, up to `READ_EVERY` steps later),
            with a dump in `fault/step-<n>.json` under the trainer's root folder (see `fault_dump`). Also for strategies
            whose sharded gradients are not DTensors.
    """

    def __init__(self, largest_skips: int = 10) -> None:
        self.largest_skips = largest_skips
        self.skipped = self.clipped = 0
        self.largest = 0.0
        self._epoch_began = (0, 0)
        self._in_a_row = 0
        self._norms: list[float] = []
        self._norm: Tensor | None = None
        self._pending: list[_Step] = []
        self._fatal: _Step | None = None
        self._clip = math.inf
        self._rows: list[Tensor | None] = []
        self._losses: list[Tensor] = []
        self._statistics: list[tuple[Tensor, Tensor]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Reject strategies whose global norm is not available, and store the clipping norm."""
        del pl_module, stage
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise InputError(
                f"trainer.strategy is {type(trainer.strategy).__name__}, where each rank sees only the norm of its gradient "
                "shard; expected DDP or FSDP2 (ModelParallelStrategy). Set trainer.strategy to ddp or fsdp2."
            )
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
            self._clip = float(trainer.gradient_clip_val)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Store the rows, and the running statistics before the accumulated step."""
        if batch_idx % trainer.accumulate_grad_batches == 0 or not self._rows:
            self._rows, self._losses = [], []
            self._statistics = [(each, each.clone()) for each in _running_statistics(pl_module)]
        self._rows.append(getattr(batch, "row", None))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Make the gradient of a non-finite loss non-finite, so that DDP's mean propagates it to all ranks."""
        del trainer, pl_module
        value = loss.detach()
        self._losses.append(value)
        if loss.requires_grad:
            # x + 0 is exactly x; NaN * 0 and inf * 0 are NaN. Without this, a NaN constant would have a finite gradient.
            loss.register_hook(lambda gradient: gradient + value * 0)  # type: ignore[no-untyped-call]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Skip a bad step; called after DDP's mean and the scaler's unscaling, before clipping."""
        parameters = _with_gradient(optimizer)
        if not parameters:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = None if scaler is None else scaler._get_scale_async().clone()
        norm = _global_norm([p.grad for p in parameters if p.grad is not None])
        if scale is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            norm = norm / scale  # fused optimizers unscale in their kernel
        self._norm = norm
        self._pending.append(_Step(trainer.global_step, norm, scale, self._losses, self._rows))
        if _is_free_to_read(norm) or len(self._pending) >= READ_EVERY:
            self._read(trainer.is_global_zero)
            self._end_if_fatal(trainer, pl_module, optimizer)
        bad = norm.isfinite().logical_not()
        if scaler is None and _skips_on_device(optimizer):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # read by torch's fused kernels
        elif scaler is None and bad:
            for parameter in parameters:
                parameter.grad = None
        if not _is_free_to_read(norm) or bad:
            with torch.no_grad():
                for place, before in self._statistics:
                    place.copy_(torch.where(bad, before, place))

    def last_step_was_skipped(self) -> bool:
        """Return whether the last optimiser step was skipped; on a GPU this synchronises."""
        return self._norm is not None and not bool(self._norm.isfinite())

    def clip(self, optimizer: Optimizer, largest: float) -> None:
        """Clip the gradients by the norm that was already computed for this step.

        Unlike Lightning's clipping, this supports a mix of shards and full tensors, and fused optimizers with a scaler.

        Args:
            optimizer: The optimizer whose gradients are clipped.
            largest: Maximum norm.
        """
        parameters = _with_gradient(optimizer)
        if self._norm is not None:
            for sharded in (False, True):
                part = [parameter for parameter in parameters if isinstance(parameter, DTensor) == sharded]
                clip_grads_with_norm_(part, largest, self._norm)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the epoch's counts; they are the same on every rank."""
        self._read(trainer.is_global_zero)
        self._end_if_fatal(trainer, pl_module, trainer.optimizers[0])
        skipped, clipped = self._epoch_began
        pl_module.log("train/skipped_steps", float(self.skipped - skipped), sync_dist=True)
        pl_module.log("train/clipped_steps", float(self.clipped - clipped), sync_dist=True)
        pl_module.log("train/largest_gradient_norm", self.largest, sync_dist=True)
        self._epoch_began, self.largest = (self.skipped, self.clipped), 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the state of the failure criterion."""
        self._read(rank() == 0)
        return {
            "skipped": self.skipped,
            "clipped": self.clipped,
            "largest": self.largest,
            "epoch_began": list(self._epoch_began),
            "in_a_row": self._in_a_row,
            "norms": list(self._norms),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`, including that of older checkpoints without clipping counts."""
        self.skipped, self.clipped = state_dict["skipped"], state_dict.get("clipped", 0)
        self.largest, self._in_a_row = state_dict.get("largest", 0.0), state_dict["in_a_row"]
        began = state_dict.get("epoch_began") or (self.skipped - state_dict.get("in_epoch", 0), 0)
        self._epoch_began = (int(began[0]), int(began[1]))
        self._norms = list(state_dict["norms"])[-LAST_NORMS:]

    def _read(self, verbose: bool) -> None:
        """Count the steps since the last reading; this is the only place that synchronises with the device."""
        steps, self._pending = self._pending, []
        if not steps:
            return
        norms = torch.stack([step.norm for step in steps]).tolist()
        scales = torch.stack([step.norm.new_ones(()) if step.scale is None else step.scale for step in steps]).tolist()
        bad: list[str] = []
        for step, norm, scale in zip(steps, norms, scales, strict=True):
            if math.isfinite(norm):
                self._in_a_row = 0
                self.clipped += norm > self._clip
                self.largest = max(self.largest, norm)
                self._norms = [*self._norms, norm][-LAST_NORMS:]
                continue
            self.skipped += 1
            self._in_a_row += scale <= 1
            bad.append(str(step.number))
            if self._in_a_row >= self.largest_skips and self._fatal is None:
                self._fatal = step
        if bad and verbose:
            print(
                f"step{'s' * (len(bad) > 1)} {', '.join(bad)}: loss or gradient not finite; skipped ({self.skipped} so far)",
                flush=True,
            )

    def _end_if_fatal(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if self._fatal is not None:
            self._end(trainer, pl_module, optimizer, self._fatal)

    def _end(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer, step: _Step) -> NoReturn:
        scale = 1.0 if step.scale is None else float(step.scale)
        losses = [float(loss) * trainer.accumulate_grad_batches / scale for loss in step.losses]
        rows = [[] if row is None else row.tolist() for row in step.rows]
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        norm = float(step.norm)
        fault = FaultRecord(step.number, trainer.current_epoch, losses, norm, rates, self._norms, rows)
        written = write_fault(Path(trainer.default_root_dir), pl_module, fault)
        worst = _worst(losses)
        raise InputError(
            f"training step {step.number}: {self.largest_skips} bad steps in a row (loss {losses[worst]:g}, gradient norm "
            f"{norm:g}, manifest rows {rows[worst]} on rank {rank()}); expected finite values. {written} Check those rows "
            "(`ctx-distill check`), lower the learning rate, or train in bf16-mixed or 32-true."
        )


def _worst(losses: list[float]) -> int:
    """Return the batch of an accumulated step to report: the first with a non-finite loss, else the last."""
    return next((place for place, loss in enumerate(losses) if not math.isfinite(loss)), len(losses) - 1)


def _with_gradient(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _is_free_to_read(norm: Tensor) -> bool:
    """Return whether the value can be read without synchronisation."""
    return norm.is_cpu


def _skips_on_device(optimizer: Optimizer) -> bool:
    """Return whether a step with `found_inf` = 1 changes nothing.

    This excludes SGD: if its first step is skipped, its momentum buffer stays uninitialised.
    """
    # Parameter groups restored from a checkpoint without fused kernels are not fused.
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and getattr(optimizer, "_step_supports_amp_scaling", False) and not isinstance(optimizer, SGD)


def _global_norm(gradients: list[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients, (), the same on every rank; shards are reduced over ranks (collective)."""
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    norms = [get_total_norm(part) for part in (sharded, [g for g in gradients if not isinstance(g, DTensor)]) if part]
    full = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return full[0] if len(full) == 1 else torch.stack(full).norm()


def _running_statistics(module: nn.Module) -> list[Tensor]:
    """Return the buffers that a forward pass changes: running mean, variance and count of batch norms."""
    norms = (each for each in module.modules() if isinstance(each, _BatchNorm) and each.training)
    return [buffer for each in norms for buffer in each.buffers()]
