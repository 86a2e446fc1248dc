"""What every stage's LightningModule promises to the pipeline."""

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
"""Names of logged values that a run repeated would not give again; they are no metrics."""
LARGEST_LOGIT_SCALE = math.log(100)
"""CLIP's bound of the learnt temperature (Radford et al. 2021)."""


class StageTask(L.LightningModule):
    """A stage: it runs under a trainer, leaves its artefact and tables in its folder, and returns its metrics."""

    def describe(self) -> dict[str, Any]:
        """Facts for `run.json`."""
        return {}

    @abstractmethod
    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Run the stage.

        Args:
            trainer: set up for this stage; logs go to its loggers.
            datamodule: the stage's data.
            folder: the stage's folder; the artefact goes to `folder / "artefact"`.

        Returns:
            Metrics as JSON values; called on every rank, used on rank zero.
        """


class TrainedTask(StageTask):
    """A stage that trains: goes on from its last checkpoint as if it had not stopped, and finishes with the chosen weights.

    Args:
        optimizer: makes the optimizer from parameter groups.
        scheduler: makes a learning-rate schedule that is stepped once an optimiser step; None: linear warm-up, then
            half a cosine down to zero at the last step.
        warmup: share of the steps that the default schedule warms up.
        select: which weights go on: those after the last epoch, or those with the lowest validation loss.
        survival: checkpoints, bad losses, hangs.
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

        What takes rank 0 long alone goes through `run_on_rank_zero`, since the other ranks wait in the next collective.
        """

    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Train, from the last checkpoint where there is one, then finish."""
        found = standing(folder / CHECKPOINTS, self._identity(folder))
        if found is not None and trainer.is_global_zero:
            print(f"resuming from {found.path}, step {found.step}")
        history = cut_logs(trainer, folder / LOG, found.step if found else 0)
        self.train()
        try:
            trainer.fit(self, datamodule=datamodule, ckpt_path=str(found.path) if found else None, weights_only=True)
        except SystemExit:
            if trainer.interrupted:  # Lightning ends the process at Ctrl-C, without a word
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
        """What a checkpoint of this run says of itself: its stage, and the key of what was asked of it."""
        request = folder / REQUEST_FILE
        key = json.loads(request.read_text()).get("key") if request.is_file() else None
        return {"stage": type(self).__name__, "request": key}

    def _load_best(self, folder: Path) -> None:
        """Take the chosen weights; collective. Rank 0 wrote the file: others may still see none, or the one before."""

        def load() -> None:
            path = folder / CHECKPOINTS / BEST
            if path.is_file():
                state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
                self.load_state_dict(state, strict=False)

        run_on_rank_zero(load)
        copy_from_rank_zero(self)

    def unfit_for_shards(self) -> dict[str, bool]:
        """What keeps this stage from FSDP2: settings by name, and whether they are asked for."""
        return {f"{type(self).__name__} (stages 2 and 3 can)": True}

    def configure_model(self) -> None:
        """Set how CT encoders are computed; shard what is trained where the strategy asks for it."""
        device = self.trainer.strategy.root_device
        check_compiler(self.compute, device)
        for module in self.modules():
            if isinstance(module, CTEncoder):
                module.compute_with(self.compute, device)
        self.shards = shard_for_training(self, self.unfit_for_shards()) or self.shards

    def configure_callbacks(self) -> list[Callback]:
        """Checkpoints; with `select: best` also of the lowest validation loss, where there is a `val` split.

        The monitored loss never sees labels in stages 1 to 3.
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
        """What this rank has summed of the epoch, and a hash of the order of the rows that it has seen."""
        return {"means": {split: means.state() for split, means in self._means.items()}, "order": self._order}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Take `rank_state` back."""
        for split, means in self._means.items():
            means.load(state["means"][split])
        self._order = state["order"]

    def merge_rank_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One rank's state out of those of another number of ranks.

        What is summed is of the global batch, and so the same on every rank. The orders are chained to one.
        """
        return {**states[0], "order": hash_json([state["order"] for state in states])}

    def resume_schedule(self, step: int, in_epoch: int, per_epoch: int) -> None:
        """Have the default schedule go on as a function of the share of the training that is done.

        A custom scheduler counts optimiser steps, and their number has changed.

        Args:
            step: optimiser steps so far.
            in_epoch: steps that are left of the epoch at hand.
            per_epoch: steps of a whole epoch.
        """
        epochs, most = self.trainer.max_epochs or 0, self.trainer.max_steps
        if self.rate_schedule is None:
            if rank() == 0:
                print(
                    "model.init_args.scheduler counts optimiser steps, and their number changes with the number of ranks: it "
                    "resumes from its step, which is another share of the training. Remove it to use the default "
                    "schedule, which follows the share of the training that is done."
                )
            return
        if epochs < 0 or 0 < most <= self.rate_schedule.steps:
            return  # a training of so many steps has as many with any number of ranks
        epoch = self.trainer.current_epoch + 1
        self.rate_schedule.resume(step, in_epoch, per_epoch * (epochs - epoch), epoch / epochs)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Chain the rows of this batch to those before."""
        del batch_idx
        rows = ",".join(str(row) for row in batch.row.tolist())
        self._order = hashlib.sha256(f"{self._order} {rows}".encode()).hexdigest()

    def row_seeds(self, rows: Tensor, *purpose: str) -> list[int]:
        """Return one seed per row: a function of the run's seed, the epoch, the row and what it is for.

        Args:
            rows: (b,) manifest rows.
            purpose: tells draws of one row apart; none for the augmentation.
        """
        return [seed_of(self.current_epoch, row, *purpose) for row in rows.tolist()]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer; `lr_factor` scales a group's learning rate."""
        return decay_groups(self)

    def configure_optimizers(self) -> Any:
        """Optimizer with weight decay on matrices only, and the schedule stepped per step."""
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
        """Clip as the trainer is set; by norm with the norm that the guard has computed already."""
        if self.guard is not None and gradient_clip_val and gradient_clip_algorithm != "value":
            self.guard.clip(optimizer, float(gradient_clip_val))
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def log_terms(self, terms: dict[str, Tensor], split: Literal["train", "val"], rows: int) -> None:
        """Sum named terms for the mean of the epoch, logged at its end as `split/term`.

        Args:
            terms: () each, of the global batch: the same on every rank.
            split: whose.
            rows: of the global batch: the weight of its terms in the mean.
        """
        self._means[split].add(terms, rows)

    def gather_once(self, rows: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """Values (b, ...) of the global batch; of a held-out row that the sampler repeated to fill up, once."""
        first = first_rows(gather_with_gradient(rows)).nonzero()[:, 0]
        return tuple(gather_with_gradient(value)[first] for value in values)

    @staticmethod
    def global_rows(rows: Tensor) -> int:
        """Number of rows of the global batch; one that the sampler repeated counts once."""
        return int(first_rows(gather_with_gradient(rows)).sum())

    def on_train_epoch_end(self) -> None:
        """Log the means of the epoch."""
        self._log_means("train")

    def on_validation_epoch_start(self) -> None:
        """Begin the sums anew."""
        self._means["val"].drain()

    def on_validation_epoch_end(self) -> None:
        """Log the means of the validation."""
        self._log_means("val")

    def _log_means(self, split: str) -> None:
        for name, value in self._means[split].drain().items():
            self.log(f"{split}/{name}", value)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Leave a validation where a signal asks for it: it is done again from the checkpoint before it."""
        del batch, batch_idx, dataloader_idx
        stop_if_asked("in validation")


def refuse_no_steps(trainer: L.Trainer) -> None:
    """Refuse trainer settings under which no optimizer step would be made; the same on every rank.

    Too few rows for the ranks are refused by `ManifestDataModule.train_dataloader`.

    Raises:
        InputError: a limit is 0.
    """
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise InputError(
                f"trainer.{name} is 0, so nothing would be trained. Raise it, or leave it out of the configuration."
            )


def check_volume_spec(artefact: Artefact, datamodule: CTDataModule) -> None:
    """Check that volumes are brought to what an encoder was trained on.

    Raises:
        InputError: another spacing, shape or window; the message names both.
    """
    require_same(
        "the volume spec of this stage", hash_json(datamodule.volume.to_config()),
        f"the volume spec that {artefact.folder} was trained with", hash_json(artefact.config["volume_spec"]),
        f"Set data.init_args.volume to {artefact.config['volume_spec']}.",
    )  # fmt: skip


def adamw(params: Any) -> torch.optim.Optimizer:
    """The optimizer where a configuration names none."""
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.05)


def last_values(task: TrainedTask) -> dict[str, Any]:
    """The last logged value of every `train/` and `val/` term, as JSON values; without timings."""
    before = task.checkpoints.logged if task.checkpoints is not None else {}
    values = {**before, **{name: float(value) for name, value in task.trainer.callback_metrics.items()}}
    return {
        name.replace("/", "_"): value if math.isfinite(value) else None
        for name, value in values.items()
        if not name.startswith(TIMINGS)
    }


def decay_groups(module: nn.Module, without: Iterable[Tensor] = ()) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices, which decay, and vectors and scalars, which do not.

    Args:
        module: whose parameters.
        without: those that are left out.
    """
    left_out = {id(parameter) for parameter in without}

    def pick(matrices: bool) -> Iterator[Tensor]:
        mine = (p for p in module.parameters() if p.requires_grad and id(p) not in left_out)
        return (p for p in mine if (p.ndim > 1) == matrices)

    matrices, vectors = list(pick(True)), list(pick(False))
    groups: list[dict[str, Any]] = [{"params": matrices}] if matrices else []
    return groups + ([{"params": vectors, "weight_decay": 0.0}] if vectors else [])


def stop_if_asked(where: str) -> None:
    """End the run where a signal has asked any rank for it; collective.

    Raises:
        StopRequested: it has.
    """
    if any_rank(signals.requested() is not None)[0]:
        raise signals.StopRequested(where)
