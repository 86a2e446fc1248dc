"""Training progress: a bar on a terminal, periodic lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from rich.progress import Progress, TextColumn

from ctx_distill.progress import progress_bar


class EpochProgress(L.Callback):
    """Show epoch, losses and remaining time, on rank zero.

    Args:
        every_s: Seconds between two lines, without a terminal.
    """

    def __init__(self, every_s: float = 15.0) -> None:
        self.every_s = every_s
        self._progress: Progress | None = None
        self._task: Any = None
        self._printed = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar at the current step."""
        del pl_module
        self._printed = time.monotonic()
        if not trainer.is_global_zero or not sys.stdout.isatty():
            return
        self._progress = progress_bar(TextColumn("{task.fields[note]}"))
        total = int(trainer.estimated_stepping_batches)
        self._task = self._progress.add_task("  training", total=total, completed=trainer.global_step, note="")
        self._progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar."""
        del pl_module, outputs, batch, batch_idx
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.global_step, note=_note(trainer))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Without a terminal, print a line at intervals and one at the end."""
        del pl_module
        now = time.monotonic()
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 >= trainer.max_epochs
        if self._progress is None and trainer.is_global_zero and (last or now - self._printed >= self.every_s):
            print(f"  epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {_note(trainer)}", flush=True)
            self._printed = now

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        del trainer, pl_module
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        del trainer, pl_module, exception
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _note(trainer: L.Trainer) -> str:
    shown = {name: trainer.callback_metrics.get(f"{name}/loss") for name in ("train", "val")}
    return "  ".join(f"{name} loss {float(value):.4f}" for name, value in shown.items() if value is not None)
