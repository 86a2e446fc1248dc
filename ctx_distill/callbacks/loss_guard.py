"""Steps of a bad loss or gradient are left out, counted and, after a set number in a row, end the run with a dump.

Every rank must decide alike, or their weights part. So one number decides: the norm of the gradients as the optimizer
is about to get them, which DDP has averaged over the ranks (and which is made whole where parameters are sharded). A
loss that is not finite on one rank is carried there by its own gradient, hence no collective is needed in a good step;
what a step costs is the norm and one `.item()`, at which the host waits for the GPU.

The rules (largest ratio, window, way back) are **ours**.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ctx_distill.callbacks.fault_dump import Fault, write_fault
from ctx_distill.distributed import gather_objects, rank
from ctx_distill.errors import InputError

WINDOW = 100
"""Good steps whose norms are remembered."""
FEWEST = 20
"""Good steps before a norm can be called exploding."""
RECOVERY = 10
"""Good steps in which the learning rate returns from one bad step, each by the same factor."""


class LossGuard(L.Callback):
    """Leaves out optimiser steps whose loss or gradient is NaN, infinite or exploding.

    Such a step changes neither weights nor the optimizer's state (moments, their step count, weight decay) nor the
    running statistics of batch norms. Step counters, learning-rate schedules and the data move on. With gradient
    accumulation one bad batch takes its whole step along. The following steps run at `back_off` times the learning
    rate, for each bad one, and go back to the schedule's over `RECOVERY` good ones; the schedule itself never sees it.

    With a GradScaler (`16-mixed`) infinite gradients of a finite loss are the scaler's to skip and are not counted,
    unless its scale is down to 1. A run without bad steps is bit-identical to one without the guard.

    Args:
        explosion: a gradient norm over so many times the median of the last `WINDOW` good ones is exploding.
        largest_skips: bad steps in a row after which the run stops.
        back_off: factor of the learning rate, in (0, 1]; 1 leaves it.

    Attributes:
        skipped: bad steps of the run so far; logged a training epoch as `train/skipped_steps`.
        skipped_now: whether the last optimiser step was left out.

    Raises:
        InputError: after `largest_skips` bad steps in a row, on every rank; `fault/step-<n>.json` under the trainer's
            root folder then tells what is known (see `fault_dump`). Also with a strategy whose gradients are
            shards without saying so.
    """

    def __init__(self, explosion: float = 100.0, largest_skips: int = 10, back_off: float = 0.5) -> None:
        self.explosion, self.largest_skips, self.back_off = explosion, largest_skips, back_off
        self.skipped = 0
        self.skipped_now = False
        self._in_epoch = 0
        self._in_a_row = 0
        self._behind = 0
        self._norms: list[float] = []
        self._batch: Any = None
        self._rows: list[Tensor | None] = []
        self._losses: list[Tensor] = []
        self._rates: list[tuple[dict[str, Any], Any]] = []
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._handles: list[Any] = []

    @property
    def rate_factor(self) -> float:
        """Of the next step's learning rate: 1 unless a bad step was short ago."""
        return float(self.back_off ** (self._behind / RECOVERY))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what the norm cannot be known of."""
        del pl_module, stage
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise InputError(
                f"trainer.strategy is {type(trainer.strategy).__name__}, whose ranks see the norm of their own shard "
                "of the gradient; expected DDP, or FSDP2 (ModelParallelStrategy). Set trainer.strategy to one of them."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Have the learning rates put back after each step, before the schedule looks at them."""
        del pl_module
        self._handles = [each.register_step_post_hook(self._restore_rates) for each in trainer.optimizers]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the optimizers."""
        del trainer, pl_module
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the optimizers."""
        del trainer, pl_module, exception
        self._close()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember what a dump would need; of earlier batches of an accumulated step, their rows alone."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._rows, self._losses = [], []
            self._statistics = [(each, each.clone()) for each in _running_statistics(pl_module)]
        self._batch = batch
        self._rows.append(getattr(batch, "row", None))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the batch go."""
        del trainer, pl_module, outputs, batch, batch_idx
        self._batch = None

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Have a loss that is not finite make a gradient that is not: it then reaches all ranks by DDP's mean."""
        del trainer, pl_module
        value = loss.detach()
        self._losses.append(value)
        if loss.requires_grad:
            # x + 0 is x to the bit; NaN * 0 and inf * 0 are NaN. A constant that is NaN would have a finite gradient.
            loss.register_hook(lambda gradient: gradient + value * 0)  # type: ignore[no-untyped-call]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Judge the step: called after DDP's mean and the scaler's unscaling, before clipping."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        # Fused optimizers take the scale off inside their own kernel.
        fused = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        norm = float(_global_norm([p.grad for p in parameters])) / (scale if fused else 1.0)
        self.skipped_now = self._is_bad(norm)
        if not self.skipped_now:
            self._norms = [*self._norms, norm][-WINDOW:]
            self._lower_rates(optimizer)
            self._in_a_row, self._behind = 0, max(0, self._behind - 1)
            return
        losses = [float(loss) * trainer.accumulate_grad_batches / scale for loss in self._losses]
        if scale > 1 and not math.isfinite(norm) and all(gather_objects([all(map(math.isfinite, losses))])):
            _take_gradients(parameters, fused)
            return
        self.skipped, self._in_epoch, self._in_a_row = self.skipped + 1, self._in_epoch + 1, self._in_a_row + 1
        if self._in_a_row >= self.largest_skips:
            self._stop(trainer, pl_module, optimizer, losses, norm)
        self._behind = min(self._behind + RECOVERY, RECOVERY * self.largest_skips)
        _take_gradients(parameters, fused)
        with torch.no_grad():
            for place, before in self._statistics:
                place.copy_(before)
        if trainer.is_global_zero:
            print(
                f"step {trainer.global_step}: loss {losses[_worst(losses)]:g}, gradient norm {norm:g}; left out "
                f"({self._in_a_row} in a row), learning rate times {self.rate_factor:.3g}",
                flush=True,
            )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the epoch's count; the same on every rank, so its mean is it."""
        del trainer
        pl_module.log("train/skipped_steps", float(self._in_epoch), sync_dist=True)
        self._in_epoch = 0

    def state_dict(self) -> dict[str, Any]:
        """All that decides the next steps."""
        return {
            "skipped": self.skipped,
            "in_epoch": self._in_epoch,
            "in_a_row": self._in_a_row,
            "behind": self._behind,
            "norms": list(self._norms),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.skipped, self._in_epoch = state_dict["skipped"], state_dict["in_epoch"]
        self._in_a_row, self._behind = state_dict["in_a_row"], state_dict["behind"]
        self._norms = list(state_dict["norms"])

    def _is_bad(self, norm: float) -> bool:
        if not math.isfinite(norm):
            return True
        if len(self._norms) < FEWEST:
            return False
        usual = median(self._norms)
        return usual > 0 and norm > self.explosion * usual

    def _lower_rates(self, optimizer: Optimizer) -> None:
        if self._behind:
            self._rates = [(group, group["lr"]) for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self.rate_factor

    def _restore_rates(self, *_: Any) -> None:
        """After the optimizer's step, and so before any schedule that computes its next rate from the last."""
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []

    def _close(self) -> None:
        self._restore_rates()
        for handle in self._handles:
            handle.remove()
        self._handles, self._batch, self._statistics = [], None, []

    def _stop(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer, losses: list[float], norm: float
    ) -> NoReturn:
        rows = [[] if row is None else row.tolist() for row in self._rows]
        rates = [float(group["lr"]) * self.rate_factor for group in optimizer.param_groups]
        fault = Fault(trainer.global_step, trainer.current_epoch, losses, norm, rates, self._norms, rows)
        written = write_fault(Path(trainer.default_root_dir), pl_module, self._batch, fault)
        worst = _worst(losses)
        usual = f"{median(self._norms):g}" if self._norms else "not known"
        raise InputError(
            f"training step {trainer.global_step}: {self._in_a_row} bad steps in a row (loss {losses[worst]:g}, "
            f"gradient norm {norm:g}, median of the last good ones {usual}, manifest rows {rows[worst]} on rank "
            f"{rank()}); expected finite ones, and a norm of at most {self.explosion:g} times the median. {written} "
            "Look at those rows (`ctx-distill check`), lower the learning rate, or train in bf16-mixed or 32-true."
        )


def _worst(losses: list[float]) -> int:
    """Which batch of an accumulated step to name: the first of a loss that is not finite, else the last."""
    return next((place for place, loss in enumerate(losses) if not math.isfinite(loss)), len(losses) - 1)


def _global_norm(gradients: list[Tensor]) -> Tensor:
    """L2 norm of all gradients, () and the same on every rank; shards are added up over their ranks (collective)."""
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    norms = [get_total_norm(part) for part in (sharded, [g for g in gradients if not isinstance(g, DTensor)]) if part]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return whole[0] if len(whole) == 1 else torch.stack(whole).norm()


def _take_gradients(parameters: list[nn.Parameter], fused: bool) -> None:
    """Leave the optimizer nothing to do.

    A fused optimizer under a scaler skips by the scaler's finding of infinities, which needs gradients to be found in.
    """
    for parameter in parameters:
        if fused and parameter.grad is not None:
            parameter.grad.fill_(math.inf)
        else:
            parameter.grad = None


def _running_statistics(module: nn.Module) -> list[Tensor]:
    """What a forward pass changes besides gradients: the running mean, variance and count of batch norms."""
    norms = (each for each in module.modules() if isinstance(each, _BatchNorm) and each.training)
    return [buffer for each in norms for buffer in each.buffers()]
