"""Base classes of the stages' LightningModules."""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from ctx_distill import signals
from ctx_distill.checkpoint import Artefact, hash_json, require_same
from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.distributed import (
    any_rank,
    copy_from_rank_zero,
    first_rows,
    gather_objects,
    gather_with_gradient,
    rank,
    run_on_rank_zero,
)
from ctx_distill.errors import InputError
from ctx_distill.files import write_json
from ctx_distill.models.compute import ComputeSettings, check_compiler
from ctx_distill.models.ct_encoder import CTEncoder
from ctx_distill.run_files import CHECKPOINTS, LOG, REQUEST_FILE, TRAINING_FILE
from ctx_distill.seeds import seed_of
from ctx_distill.training.callbacks.checkpoint_files import BEST, standing
from ctx_distill.training.callbacks.checkpoints import Checkpoints
from ctx_distill.training.callbacks.loss_guard import LossGuard
from ctx_distill.training.callbacks.watchdog import Watchdog
from ctx_distill.training.epoch_means import EpochMeans
from ctx_distill.training.fault_tolerance import SurvivalSettings
from ctx_distill.training.fused_optimizer import fused_on
from ctx_distill.training.resumed_logs import cut_logs, join_history
from ctx_distill.training.schedule import WarmupCosine
from ctx_distill.training.sharding import Shards, by_layout, shard_for_training

TIMINGS = ("train/lookup_ms", "train/lookup_share")
"""Logged values that are not reproducible, and therefore not metrics."""
LARGEST_LOGIT_SCALE = math.log(100)
"""CLIP's upper bound of the log logit scale (Radford et al. 2021)."""


class StageTask(L.LightningModule):
    """A stage: runs under a trainer, writes its artefact and tables to its folder, and returns its metrics."""

    def describe(self) -> dict[str, Any]:
        """Return facts for `run.json`."""
        return {}

    @abstractmethod
    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Run the stage.

        Args:
            trainer: The trainer of this stage, with its loggers.
            datamodule: The stage's data.
            folder: The stage's folder; the artefact is written to `folder / "artefact"`.

        Returns:
            Metrics as JSON values. Called on every rank; the result of rank zero is used.
        """


class TrainedTask(StageTask):
    """A stage that trains: resumes from its last checkpoint, and finishes with the selected weights.

    Args:
        optimizer: Creates the optimizer from parameter groups.
        scheduler: Creates a learning-rate schedule that is stepped once per optimiser step; None uses linear warm-up
            followed by a half cosine to zero at the last step.
        warmup: Share of the steps in which the default schedule warms up.
        select: Weights to finish with: those after the last epoch, or those with the lowest validation loss.
        survival: Settings of fault tolerance: checkpoints, non-finite losses, hangs.
    """

    compute = ComputeSettings()
    shards: Shards | None = None

    def __init__(
        self,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        warmup: float,
        select: Literal["last", "best"],
        survival: SurvivalSettings,
    ) -> None:
        super().__init__()
        self.warmup = warmup
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.select = select
        self.survival = survival
        self.checkpoints: Checkpoints | None = None
        self.guard: LossGuard | None = None
        self.rate_schedule: WarmupCosine | None = None
        self._means = {split: EpochMeans() for split in ("train", "val")}
        self._order = ""

    @abstractmethod
    def finish(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Write the artefact and return the metrics, after training.

        Long work on rank 0 must go through `run_on_rank_zero`, because the other ranks wait in the next collective.
        """

    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Train, from the last checkpoint if there is one, then finish."""
        checkpoint = standing(folder / CHECKPOINTS, self._identity(folder))
        if checkpoint is not None and trainer.is_global_zero:
            print(f"resuming from {checkpoint.path}, step {checkpoint.step}")
        history = cut_logs(trainer, folder / LOG, checkpoint.step if checkpoint else 0)
        self.train()
        path = str(checkpoint.path) if checkpoint else None
        try:
            trainer.fit(self, datamodule=datamodule, ckpt_path=path, weights_only=True)
        except SystemExit:
            if trainer.interrupted:  # on Ctrl-C, Lightning exits without a message
                raise KeyboardInterrupt from None
            raise
        if rank() == 0:
            join_history(history, folder / LOG)
        if self.shards is not None:
            self.shards.gather()
        facts = {"steps": trainer.global_step, "data_order": hash_json(gather_objects([self._order]))}
        if self.guard is not None:
            facts |= {"skipped_steps": self.guard.skipped, "clipped_steps": self.guard.clipped}
        if self.select == "best":
            self._load_best(folder)
        self.eval()
        metrics = self.finish(trainer, datamodule, folder)
        if rank() == 0:
            write_json(folder / TRAINING_FILE, facts)
        return metrics

    def _identity(self, folder: Path) -> dict[str, str | None]:
        """Return the identity that checkpoints of this run carry: the stage and the request key."""
        request = folder / REQUEST_FILE
        key = json.loads(request.read_text()).get("key") if request.is_file() else None
        return {"stage": type(self).__name__, "request": key}

    def _load_best(self, folder: Path) -> None:
        """Load the weights with the lowest validation loss (collective).

        Rank 0 reads and broadcasts them, because other ranks may not see its file yet, or may see an older one.
        """

        def load() -> None:
            path = folder / CHECKPOINTS / BEST
            if path.is_file():
                state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
                self.load_state_dict(state, strict=False)

        run_on_rank_zero(load)
        copy_from_rank_zero(self)

    def unfit_for_shards(self) -> dict[str, bool]:
        """Return settings that are incompatible with FSDP2, by name, and whether they are enabled."""
        return {f"{type(self).__name__} (only stages 2 and 3 support it)": True}

    def configure_model(self) -> None:
        """Configure the computation of CT encoders, and shard the trained modules if the strategy requires it."""
        device = self.trainer.strategy.root_device
        check_compiler(self.compute, device)
        for module in self.modules():
            if isinstance(module, CTEncoder):
                module.compute_with(self.compute, device)
        self.shards = shard_for_training(self, self.unfit_for_shards()) or self.shards

    def configure_callbacks(self) -> list[Callback]:
        """Return the callbacks; with `select: best` and a `val` split, also keep the lowest validation loss.

        In stages 1 to 3, the monitored loss never uses labels.
        """
        folder = Path(self.trainer.default_root_dir)
        datamodule = getattr(self.trainer, "datamodule", None)
        selects = self.select == "best" and datamodule is not None and len(datamodule.validation_rows()) > 0
        self.checkpoints = Checkpoints(
            folder / CHECKPOINTS,
            self.survival.checkpoint_minutes,
            self._identity(folder),
            "val/loss" if selects else None,
        )
        self.guard = LossGuard(self.survival.largest_skips)
        return [self.checkpoints, self.guard, Watchdog(self.survival.hang_minutes)]

    def rank_state(self) -> dict[str, Any]:
        """Return this rank's sums of the epoch, and a hash of the order of the rows that it has processed."""
        return {"means": {split: means.state() for split, means in self._means.items()}, "order": self._order}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore `rank_state`."""
        for split, means in self._means.items():
            means.load(state["means"][split])
        self._order = state["order"]

    def merge_rank_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Merge the states of another number of ranks into one.

        Sums are over the global batch, so they are the same on every rank. The order hashes are combined.
        """
        return {**states[0], "order": hash_json([state["order"] for state in states])}

    def resume_schedule(self, step: int, in_epoch: int, per_epoch: int) -> None:
        """Continue the default schedule by training progress, after the number of ranks has changed.

        A custom scheduler counts optimiser steps, whose number has changed, so it cannot be adjusted.

        Args:
            step: Optimiser steps so far.
            in_epoch: Steps remaining in the current epoch.
            per_epoch: Steps of a complete epoch.
        """
        epochs, most = self.trainer.max_epochs or 0, self.trainer.max_steps
        if self.rate_schedule is None:
            if rank() == 0:
                print(
                    "model.init_args.scheduler counts optimiser steps, whose number has changed with the number of ranks. It "
                    "resumes at the same step, which is a different share of the training. Remove it to use the default "
                    "schedule, which follows the progress of the training."
                )
            return
        if epochs < 0 or 0 < most <= self.rate_schedule.steps:
            return  # with max_steps, the number of steps does not depend on the number of ranks
        epoch = self.trainer.current_epoch + 1
        self.rate_schedule.resume(step, in_epoch, per_epoch * (epochs - epoch), epoch / epochs)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Update the hash of the row order."""
        del batch_idx
        rows = ",".join(str(row) for row in batch.row.tolist())
        self._order = hashlib.sha256(f"{self._order} {rows}".encode()).hexdigest()

    def row_seeds(self, rows: Tensor, *purpose: str) -> list[int]:
        """Return one seed per row, which depends on the run's seed, the epoch, the row and the purpose only.

        Args:
            rows: (b,) manifest rows.
            purpose: Distinguishes several draws for one row; empty for the augmentation.
        """
        return [seed_of(self.current_epoch, row, *purpose) for row in rows.tolist()]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups; `lr_factor` scales a group's learning rate."""
        return decay_groups(self)

    def configure_optimizers(self) -> Any:
        """Return the optimizer, with weight decay on matrices only, and the schedule, stepped per optimiser step."""
        refuse_no_steps(self.trainer)
        groups = by_layout(self.parameter_groups())
        factors = [group.pop("lr_factor", 1.0) for group in groups]
        optimizer = fused_on(self.device, self.make_optimizer(groups))
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] *= factor
        if self.make_scheduler is None:
            steps = max(2, int(self.trainer.estimated_stepping_batches))
            self.rate_schedule = WarmupCosine(steps, max(1, round(self.warmup * steps)))
            scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate_schedule)
        else:
            scheduler = self.make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as configured in the trainer; clipping by norm reuses the norm that the guard has computed."""
        if self.guard is not None and gradient_clip_val and gradient_clip_algorithm != "value":
            self.guard.clip(optimizer, float(gradient_clip_val))
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def log_terms(self, terms: dict[str, Tensor], split: Literal["train", "val"], rows: int) -> None:
        """Accumulate named terms for the epoch mean, which is logged as `split/term`.

        Args:
            terms: () each, of the global batch, the same on every rank.
            split: Split of the batch.
            rows: Rows of the global batch, the weight of the terms in the mean.
        """
        self._means[split].add(terms, rows)

    def gather_once(self, rows: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """Gather values (b, ...) of the global batch, dropping held-out rows that the sampler repeated as padding."""
        first = first_rows(gather_with_gradient(rows)).nonzero()[:, 0]
        return tuple(gather_with_gradient(value)[first] for value in values)

    @staticmethod
    def global_rows(rows: Tensor) -> int:
        """Return the number of rows of the global batch, counting repeated rows once."""
        return int(first_rows(gather_with_gradient(rows)).sum())

    def on_train_epoch_end(self) -> None:
        """Log the epoch means."""
        self._log_means("train")

    def on_validation_epoch_start(self) -> None:
        """Reset the validation sums."""
        self._means["val"].drain()

    def on_validation_epoch_end(self) -> None:
        """Log the validation means."""
        self._log_means("val")

    def _log_means(self, split: str) -> None:
        for name, value in self._means[split].drain().items():
            self.log(f"{split}/{name}", value)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Stop on a signal; the validation is repeated from the checkpoint before it."""
        del batch, batch_idx, dataloader_idx
        stop_if_asked("in validation")


def refuse_no_steps(trainer: L.Trainer) -> None:
    """Check that the trainer's limits allow optimiser steps; the result is the same on every rank.

    Too few rows for the ranks are rejected by `ManifestDataModule.train_dataloader`.

    Raises:
        InputError: a limit is 0.
    """
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise InputError(
                f"trainer.{name} is 0, so nothing would be trained; expected 1 or more. Increase it, or remove it from the "
                "configuration."
            )


def check_volume_spec(artefact: Artefact, datamodule: CTDataModule) -> None:
    """Check that volumes are preprocessed as in the encoder's training.

    Raises:
        InputError: Spacing, shape or window differ.
    """
    require_same(
        "the volume spec of this stage", hash_json(datamodule.volume.to_config()),
        f"the volume spec that {artefact.folder} was trained with", hash_json(artefact.config["volume_spec"]),
        f"Set data.init_args.volume to {artefact.config['volume_spec']}.",
    )  # fmt: skip


def adamw(params: Any) -> torch.optim.Optimizer:
    """Return the default optimizer."""
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.05)


def last_values(task: TrainedTask) -> dict[str, Any]:
    """Return the last logged value of every `train/` and `val/` term, except timings, as JSON values."""
    before = task.checkpoints.logged if task.checkpoints is not None else {}
    values = {**before, **{name: float(value) for name, value in task.trainer.callback_metrics.items()}}
    return {
        name.replace("/", "_"): value if math.isfinite(value) else None
        for name, value in values.items()
        if not name.startswith(TIMINGS)
    }


def decay_groups(module: nn.Module, without: Iterable[Tensor] = ()) -> list[dict[str, Any]]:
    """Return trainable parameters in two groups: matrices with weight decay, and vectors and scalars without.

    Args:
        module: The module.
        without: Parameters to exclude.
    """
    excluded = {id(parameter) for parameter in without}

    def pick(matrices: bool) -> Iterator[Tensor]:
        trainable = (p for p in module.parameters() if p.requires_grad and id(p) not in excluded)
        return (p for p in trainable if (p.ndim > 1) == matrices)

    matrices, vectors = list(pick(True)), list(pick(False))
    groups: list[dict[str, Any]] = [{"params": matrices}] if matrices else []
    return groups + ([{"params": vectors, "weight_decay": 0.0}] if vectors else [])


def stop_if_asked(where: str) -> None:
    """Stop the run if any rank has received a stop signal (collective).

    Raises:
        StopRequested: a rank has received one.
    """
    if any_rank(signals.requested() is not None)[0]:
        raise signals.StopRequested(where)
