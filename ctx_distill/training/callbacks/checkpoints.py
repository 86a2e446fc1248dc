"""Checkpoints for exact resumption: weights, optimiser, schedule, position in the epoch, random state and running sums.

A checkpoint is written **before a training batch**, when the previous batch is complete, so no batch and no log row is
lost or repeated. It is written at the first batch of every epoch but the first, at fixed intervals, before the last step
of an epoch with a long validation, on a stop signal, and at the end of training. With gradient accumulation, it is written
at the first batch of a step, because checkpoints do not contain gradients.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import lightning as L
import torch

from ctx_distill import signals
from ctx_distill.distributed import any_rank, gather_objects, rank, run_on_rank_zero, world_size
from ctx_distill.errors import InputError
from ctx_distill.training.callbacks import random_state
from ctx_distill.training.callbacks.checkpoint_files import BEST, LAST, OWN, PREVIOUS, part_of, settle

LONG_VALIDATION = 60.0
"""Duration of a validation, in seconds, from which a checkpoint is written before the epoch's last step."""


class Resumable(Protocol):
    """A task with state in checkpoints beyond its weights."""

    def rank_state(self) -> dict[str, Any]:
        """Return the state of this rank."""

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore `rank_state`."""

    def merge_rank_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Merge the states of another number of ranks into one."""

    def resume_schedule(self, step: int, in_epoch: int, per_epoch: int) -> None:
        """Distribute the rest of the learning-rate schedule over the remaining steps."""


class ResumableData(Protocol):
    """A data module that can continue an interrupted epoch."""

    reopen: bool

    def batches_left(self, most: int) -> int:
        """Return the remaining global batches of the epoch, which has `most` batches in total."""


class Checkpoints(L.Callback):
    """Write and restore the checkpoints of a training stage.

    Args:
        folder: Folder of the checkpoints.
        minutes: Minutes between checkpoints within an epoch.
        identity: Identity of the run, which is stored in checkpoints and compared by `checkpoint_files.standing`.
        monitor: Name of the logged value whose minimum `best.ckpt` keeps; None disables it.
    """

    def __init__(
        self, folder: Path, minutes: float, identity: Mapping[str, str | None], monitor: str | None = None
    ) -> None:
        self.folder, self.minutes, self.identity, self.monitor = folder, minutes, dict(identity), monitor
        self.best: float | None = None
        self.logged: dict[str, float] = {}
        self._restored: dict[str, Any] | None = None
        self._over = False
        self._saved_step, self._saved_at = -1, time.monotonic()
        self._validation_began, self._validation_s = 0.0, 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install our signal handlers instead of Lightning's, and delete incomplete files of a killed run."""
        del pl_module
        signals.install()
        steps = gather_objects([self._saved_step])
        if len(set(steps)) > 1:  # each rank looked for its checkpoint before the process group existed
            raise InputError(
                f"{self.folder}: the ranks would resume from different checkpoints (steps {steps}, -1 is none); expected the"
                " same on all nodes. Use a shared file system, and repeat the command."
            )
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".*.part"):
                leftover.unlink(missing_ok=True)
        self._saved_at = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """If the number of ranks has changed, recompute the epoch's batches and the schedule's steps."""
        if self._restored is None or self._restored["over"]:
            return
        data = cast(ResumableData, getattr(trainer, "datamodule", None))
        regrouped = len(self._restored["ranks"]) != world_size()
        if regrouped:
            self._regroup(trainer, cast(Resumable, pl_module), data)
        if regrouped or getattr(data, "reopen", False):
            fetcher = trainer.fit_loop._data_fetcher
            assert fetcher is not None
            iter(fetcher)  # workers may have prefetched in another order

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore the random state that was saved before this batch, and write a checkpoint if one is due."""
        del batch
        if self._restored is not None:
            self._take_up(trainer, pl_module)
        if batch_idx % trainer.accumulate_grad_batches:
            return  # a checkpoint would lose the accumulated gradients
        last_step = batch_idx + trainer.accumulate_grad_batches >= trainer.num_training_batches
        stop, due = any_rank(
            signals.requested() is not None,
            time.monotonic() - self._saved_at >= 60 * self.minutes
            or (last_step and self._validation_s >= LONG_VALIDATION),
        )
        if stop or due or (batch_idx == 0 and trainer.current_epoch > 0):
            self._save(trainer)
        if stop:
            raise signals.StopRequested(f"step {trainer.global_step}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the trained weights and the last logged values."""
        del pl_module
        self._over = True
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._save(trainer, again=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start timing the validation."""
        del trainer, pl_module
        self._validation_began = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store the duration of the validation."""
        del trainer, pl_module
        self._validation_s = time.monotonic() - self._validation_began

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the weights of the lowest validation loss."""
        del pl_module
        value = None if self.monitor is None else trainer.callback_metrics.get(self.monitor)
        if value is None:
            return
        better = self.best is None or float(value) < self.best
        # Rank 0 decides, because on GPUs the last bits of a loss may differ between ranks, and saving is collective.
        if not any_rank(better and trainer.is_global_zero)[0]:
            return
        self.best = float(value)
        weights = trainer.strategy.lightning_module_state_dict()
        path = self.folder / BEST

        def write() -> None:
            with self._write_errors(trainer, path):
                content = io.BytesIO()  # torch's file writer raises RuntimeError, not OSError, on a full disk
                torch.save({"state_dict": weights, "global_step": trainer.global_step}, content)
                part_of(path).write_bytes(content.getbuffer())
                settle(path)

        run_on_rank_zero(write)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the state that is not part of Lightning's checkpoint."""
        local_state = random_state.capture() | {"task": cast(Resumable, pl_module).rank_state()}
        loop = trainer.fit_loop.epoch_loop
        if not self._over:
            # The batch that comes next may be the last of the epoch, but the last complete batch is not.
            checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
        checkpoint[OWN] = {
            "identity": self.identity,
            "ranks": gather_objects([local_state]),
            "batches_that_stepped": loop._batches_that_stepped,
            "best": self.best,
            "logged": self.logged,
            "over": self._over,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the state that `on_save_checkpoint` added until the first batch."""
        del trainer
        restored = checkpoint[OWN]
        self.best, self.logged = restored["best"], restored["logged"]
        self._restored, self._saved_step = restored, int(checkpoint["global_step"])
        if restored["over"]:
            cast(Resumable, pl_module).load_rank_state(self._local_state(pl_module)["task"])

    def _local_state(self, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return this rank's state; with another number of ranks, a merged state and one rank's random state."""
        assert self._restored is not None
        ranks: list[dict[str, Any]] = self._restored["ranks"]
        state = ranks[rank() % len(ranks)]
        if len(ranks) == world_size():
            return state
        return {**state, "task": cast(Resumable, pl_module).merge_rank_states([each["task"] for each in ranks])}

    def _regroup(self, trainer: L.Trainer, task: Resumable, data: ResumableData) -> None:
        assert self._restored is not None
        if trainer.is_global_zero:
            print(
                f"resumed with {world_size()} ranks from a checkpoint of {len(self._restored['ranks'])} ranks; the schedule "
                "is the same and each row of the epoch is used once, but the result is not bit-identical"
            )
        batches, together = int(trainer.num_training_batches), trainer.accumulate_grad_batches
        done = batches - data.batches_left(batches)
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        progress.ready = progress.started = progress.processed = progress.completed = done
        per_epoch = math.ceil(batches / together)
        task.resume_schedule(trainer.global_step, per_epoch - done // together, per_epoch)

    def _take_up(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._restored is not None
        state = self._local_state(pl_module)
        cast(Resumable, pl_module).load_rank_state(state["task"])
        random_state.restore(state)
        # When it restores in mid-epoch, Lightning counts the batch that is about to run as complete.
        trainer.fit_loop.epoch_loop._batches_that_stepped = self._restored["batches_that_stepped"]
        self._restored = None

    def _save(self, trainer: L.Trainer, again: bool = False) -> None:
        if trainer.global_step == self._saved_step and not again:
            return
        for logger in trainer.loggers:
            logger.save()
        path = self.folder / LAST
        with self._write_errors(trainer, path):
            trainer.save_checkpoint(part_of(path))
            run_on_rank_zero(lambda: settle(path, keep=self.folder / PREVIOUS))
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def _write_errors(self, trainer: L.Trainer, path: Path) -> _WriteErrors:
        return _WriteErrors(path, trainer.global_step, self._saved_step)


class _WriteErrors:
    """On a failed write, delete the incomplete file and raise InputError instead of OSError."""

    def __init__(self, path: Path, step: int, before: int) -> None:
        self.path, self.step, self.before = path, step, before

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        if rank() == 0:  # another rank would delete what rank 0 is writing
            part_of(self.path).unlink(missing_ok=True)
        if isinstance(error, OSError):
            latest = f"the latest is of step {self.before}" if self.before >= 0 else "there is none yet"
            raise InputError(
                f"{self.path}: the checkpoint of step {self.step} cannot be written ({error.strerror or error}); {latest}."
                " Free space or make the folder writable, and repeat the command."
            ) from error
