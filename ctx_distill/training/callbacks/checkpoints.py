"""Checkpoints from which a run goes on exactly: weights, optimiser, schedule, place in the epoch, random state, sums.

A checkpoint is taken **before a training batch**, when everything of the batch before it is done: Lightning's progress
then says how many batches are complete, and neither a batch nor a log row is lost or doubled. It is taken at the first
batch of every epoch but the first, every so many minutes, before the last step of an epoch whose validation takes long,
when a signal asks the run to stop, and once when training is over. With gradient accumulation all of these wait for the
first batch of a step, when no gradients are held that a checkpoint would lose.
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
"""Seconds from which on a validation is not put at risk with the epoch before it."""


class Resumable(Protocol):
    """What a task keeps of its own in a checkpoint, beyond its weights."""

    def rank_state(self) -> dict[str, Any]:
        """State of this rank alone."""

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Take `rank_state` back."""

    def merge_rank_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One rank's state out of those of another number of ranks."""

    def resume_schedule(self, step: int, in_epoch: int, per_epoch: int) -> None:
        """Spread what is left of the learning-rate schedule over the steps that are left."""


class ResumableData(Protocol):
    """What a data module knows of an epoch that was interrupted."""

    reopen: bool

    def batches_left(self, most: int) -> int:
        """Global batches that are left of it, of a whole epoch of `most`."""


class Checkpoints(L.Callback):
    """Writes and restores the checkpoints of a training stage.

    Args:
        folder: where they go.
        minutes: between two within an epoch.
        identity: of the run, by name; a checkpoint carries it, and `checkpoint_files.standing` compares it.
        monitor: name of the logged value whose lowest point `best.ckpt` keeps; None keeps none.
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
        """Note signals here rather than where Lightning would end the epoch on them; drop what a kill left half-written."""
        del pl_module
        signals.install()
        steps = gather_objects([self._saved_step])
        if len(set(steps)) > 1:  # each rank looked for its checkpoint before there was a process group
            raise InputError(
                f"{self.folder}: the ranks would resume from different checkpoints (steps {steps}, -1 is none); expected one."
                " All nodes must see the same files. Give the same command again."
            )
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".*.part"):
                left.unlink(missing_ok=True)
        self._saved_at = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Where the number of ranks has changed, count the epoch's batches and the schedule's steps anew."""
        if self._restored is None or self._restored["over"]:
            return
        data = cast(ResumableData, getattr(trainer, "datamodule", None))
        regrouped = len(self._restored["ranks"]) != world_size()
        if regrouped:
            self._regroup(trainer, cast(Resumable, pl_module), data)
        if regrouped or getattr(data, "reopen", False):
            fetcher = trainer.fit_loop._data_fetcher
            assert fetcher is not None
            iter(fetcher)  # workers may have read ahead in another order

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take up the random state that was saved before this batch; write a checkpoint where one is due."""
        del batch
        if self._restored is not None:
            self._take_up(trainer, pl_module)
        if batch_idx % trainer.accumulate_grad_batches:
            return  # gradients are held that a checkpoint would lose
        last_step = batch_idx + trainer.accumulate_grad_batches >= trainer.num_training_batches
        asked, due = any_rank(
            signals.requested() is not None,
            time.monotonic() - self._saved_at >= 60 * self.minutes
            or (last_step and self._validation_s >= LONG_VALIDATION),
        )
        if asked or due or (batch_idx == 0 and trainer.current_epoch > 0):
            self._save(trainer)
        if asked:
            raise signals.StopRequested(f"step {trainer.global_step}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The trained weights, and what was logged last."""
        del pl_module
        self._over = True
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._save(trainer, again=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time the validation."""
        del trainer, pl_module
        self._validation_began = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Know how long it took."""
        del trainer, pl_module
        self._validation_s = time.monotonic() - self._validation_began

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the weights of the lowest validation loss."""
        del pl_module
        value = None if self.monitor is None else trainer.callback_metrics.get(self.monitor)
        if value is None:
            return
        better = self.best is None or float(value) < self.best
        # Rank 0 decides: on GPUs the last bits of a loss may differ, and what follows is collective.
        if not any_rank(better and trainer.is_global_zero)[0]:
            return
        self.best = float(value)
        weights = trainer.strategy.lightning_module_state_dict()
        path = self.folder / BEST

        def write() -> None:
            with self._room(trainer, path):
                content = io.BytesIO()  # torch's own writer says RuntimeError where the disk is full
                torch.save({"state_dict": weights, "global_step": trainer.global_step}, content)
                part_of(path).write_bytes(content.getbuffer())
                settle(path)

        run_on_rank_zero(write)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning's state lacks."""
        own = random_state.capture() | {"task": cast(Resumable, pl_module).rank_state()}
        loop = trainer.fit_loop.epoch_loop
        if not self._over:
            # The batch that comes now may be the last one; the last that is complete is not.
            checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
        checkpoint[OWN] = {
            "identity": self.identity,
            "ranks": gather_objects([own]),
            "batches_that_stepped": loop._batches_that_stepped,
            "best": self.best,
            "logged": self.logged,
            "over": self._over,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what `on_save_checkpoint` added until the first batch."""
        del trainer
        own = checkpoint[OWN]
        self.best, self.logged = own["best"], own["logged"]
        self._restored, self._saved_step = own, int(checkpoint["global_step"])
        if own["over"]:
            cast(Resumable, pl_module).load_rank_state(self._own_rank(pl_module)["task"])

    def _own_rank(self, pl_module: L.LightningModule) -> dict[str, Any]:
        """This rank's part of the checkpoint; of another number of ranks, the random state of one of them."""
        assert self._restored is not None
        ranks: list[dict[str, Any]] = self._restored["ranks"]
        own = ranks[rank() % len(ranks)]
        if len(ranks) == world_size():
            return own
        return {**own, "task": cast(Resumable, pl_module).merge_rank_states([each["task"] for each in ranks])}

    def _regroup(self, trainer: L.Trainer, task: Resumable, data: ResumableData) -> None:
        assert self._restored is not None
        if trainer.is_global_zero:
            print(
                f"resumed with {world_size()} ranks from a checkpoint of {len(self._restored['ranks'])}: the same schedule, "
                "each row of the epoch once, but not bit for bit"
            )
        batches, together = int(trainer.num_training_batches), trainer.accumulate_grad_batches
        done = batches - data.batches_left(batches)
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        progress.ready = progress.started = progress.processed = progress.completed = done
        per_epoch = math.ceil(batches / together)
        task.resume_schedule(trainer.global_step, per_epoch - done // together, per_epoch)

    def _take_up(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._restored is not None
        own = self._own_rank(pl_module)
        cast(Resumable, pl_module).load_rank_state(own["task"])
        random_state.restore(own)
        # Lightning adds a step to what it restores in mid-epoch, as if the batch were done that is run now.
        trainer.fit_loop.epoch_loop._batches_that_stepped = self._restored["batches_that_stepped"]
        self._restored = None

    def _save(self, trainer: L.Trainer, again: bool = False) -> None:
        if trainer.global_step == self._saved_step and not again:
            return
        for logger in trainer.loggers:
            logger.save()
        path = self.folder / LAST
        with self._room(trainer, path):
            trainer.save_checkpoint(part_of(path))
            run_on_rank_zero(lambda: settle(path, keep=self.folder / PREVIOUS))
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def _room(self, trainer: L.Trainer, path: Path) -> _Room:
        return _Room(path, trainer.global_step, self._saved_step)


class _Room:
    """A disk without room is a clear error, and leaves nothing half-written."""

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
            stands = f"that of step {self.before} stands" if self.before >= 0 else "none stands yet"
            raise InputError(
                f"{self.path}: the checkpoint of step {self.step} cannot be written ({error.strerror or error}); {stands}."
                " Make room, or make it writable, and give the same command again."
            ) from error
