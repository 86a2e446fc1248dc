"""What every stage's LightningModule promises to the pipeline."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from ctx_distill.checkpoint import Artefact, hash_json, require_same
from ctx_distill.data.datamodules import CTDataModule
from ctx_distill.distributed import rank
from ctx_distill.files import write_text

LAST = "last.ckpt"
BEST = "best.ckpt"
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
    """A stage that trains: resumes from its last checkpoint, and finishes with the chosen weights.

    Args:
        optimizer: makes the optimizer from parameter groups.
        scheduler: makes a learning-rate schedule that is stepped once an optimiser step; None: linear warm-up, then
            half a cosine down to zero at the last step.
        warmup: share of the steps that the default schedule warms up.
        select: which weights go on: those after the last epoch, or those with the lowest validation loss.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        warmup: float,
        select: Literal["last", "best"],
    ) -> None:
        super().__init__()
        self.warmup = warmup
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.select = select

    @abstractmethod
    def finish(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Write the artefact and return the metrics, after training."""

    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Train, from the last checkpoint where there is one, then finish."""
        checkpoint = readable_checkpoint(folder)
        curves = folder / "logs" / "metrics.csv"
        history = keep_history(curves) if checkpoint else None
        self.train()
        trainer.fit(self, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
        if history is not None and rank() == 0:
            join_history(history, curves)
        if trainer.interrupted:
            raise KeyboardInterrupt
        if self.select == "best":
            self._load_best(folder)
        self.eval()
        return self.finish(trainer, datamodule, folder)

    def _load_best(self, folder: Path) -> None:
        path = folder / "checkpoints" / BEST
        if path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
            self.load_state_dict(state, strict=False)

    def configure_callbacks(self) -> list[Callback]:
        """A checkpoint after every epoch, and the one of lowest validation loss where there is a `val` split.

        The monitored loss never sees labels in stages 1 to 3.
        """
        root = Path(self.trainer.default_root_dir) / "checkpoints"
        last = ModelCheckpoint(root, LAST.removesuffix(".ckpt"), save_on_train_epoch_end=True,
                               enable_version_counter=False)  # fmt: skip
        manifest = getattr(getattr(self.trainer, "datamodule", None), "manifest", None)
        if self.select == "last" or manifest is None or not len(manifest.split("val")):
            return [last]
        best = ModelCheckpoint(root, BEST.removesuffix(".ckpt"), monitor="val/loss", save_on_train_epoch_end=True,
                               enable_version_counter=False)  # fmt: skip
        return [best, last]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer; `lr_factor` scales a group's learning rate."""
        return decay_groups(self)

    def configure_optimizers(self) -> Any:
        """Optimizer with weight decay on matrices only, and the schedule stepped per step."""
        groups = self.parameter_groups()
        factors = [group.pop("lr_factor", 1.0) for group in groups]
        optimizer = self.make_optimizer(groups)
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] *= factor
        if self.make_scheduler is None:
            steps = max(2, int(self.trainer.estimated_stepping_batches))
            rate = partial(warmup_cosine, steps=steps, warmup=max(1, round(self.warmup * steps)))
            scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        else:
            scheduler = self.make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def log_terms(self, terms: dict[str, Tensor], split: str, batch_size: int) -> None:
        """Log named terms as `split/term`, averaged over the epoch and the ranks."""
        for name, value in terms.items():
            shown = name == "loss"
            self.log(f"{split}/{name}", value, on_step=False, on_epoch=True, prog_bar=shown, sync_dist=True,
                     batch_size=batch_size)  # fmt: skip


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


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine to zero at the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def last_values(trainer: L.Trainer) -> dict[str, Any]:
    """The last logged value of every `train/` and `val/` term, as JSON values."""
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {name.replace("/", "_"): value if math.isfinite(value) else None for name, value in values.items()}


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


def keep_history(curves: Path) -> Path:
    """Put the rows logged so far aside, since Lightning's CSV logger begins a new file when a run is resumed."""
    history = curves.with_name("metrics.before.csv")
    if curves.is_file() and rank() == 0:
        join_history(history, curves)
        curves.replace(history)
    return history


def join_history(history: Path, curves: Path) -> None:
    """Put the rows of before a resume in front of those since, less the steps that were run again."""
    parts = [pd.read_csv(path) for path in (history, curves) if path.is_file() and path.stat().st_size]
    if len(parts) == 2:
        parts[0] = parts[0][parts[0]["step"] < parts[1]["step"].min()]
        write_text(curves, pd.concat(parts, ignore_index=True).to_csv(index=False, lineterminator="\n"))


def readable_checkpoint(folder: Path) -> str | None:
    """The stage's last checkpoint where it can be read; a torn one is passed over with a word."""
    path = folder / "checkpoints" / LAST
    if not path.is_file():
        return None
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn zip raises whatever its layer finds
        print(f"{path}: not readable ({type(error).__name__}); this stage starts again from its beginning")
        return None
    print(f"resuming from {path}")
    return str(path)
