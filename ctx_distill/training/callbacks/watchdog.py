"""Watchdog: stop a run that hangs, and report the rank that the others wait for.

If a rank is stuck, or has exited without closing its connections, all others wait for it in a collective. Each rank
therefore has a thread that periodically records the progress of its main thread (`rank_records`). Without progress for
the configured time, the thread reads the records of all ranks, reports on stderr which rank is behind, prints the Python
stacks, and ends the process.

It uses `os._exit`, because an exception in a thread ends only that thread, and one that is set on the main thread is
raised at its next Python line, which a process inside a collective, a kernel or a read never reaches.

torch's timeouts do not report the rank: by default, gloo raises "Timed out waiting" after 30 min, and NCCL's watchdog
aborts after 10 min (30 min with Lightning's `DDPStrategy` and `ModelParallelStrategy`). They must be longer than the
watchdog's: `strategy.timeout`, and `timeout` of every `new_group`.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from ctx_distill.distributed import rank, world_size
from ctx_distill.signals import StopRequested
from ctx_distill.training.callbacks.rank_records import RankRecord, explain, read_records, record_file, write_record

HUNG = 70
"""Exit status (EX_SOFTWARE) of a run that hung; unlike 75, it does not request a rerun."""
INTERVAL_S = 5.0
"""Maximum seconds between two records of a rank."""
COLLECTIVES = (f"torch{os.sep}distributed{os.sep}", f"torch{os.sep}autograd{os.sep}graph.py")
"""Files in which a main thread waits for other ranks; backward ends by waiting for DDP's mean."""


class Watchdog(L.Callback):
    """End a run in which this rank has made no progress for a set time, and report the rank that blocks it.

    Batches of training, validation and prediction, backward passes, checkpoints and ends of epochs count as progress.
    Time in which the process was suspended or had no CPU does not count. If another rank's process dies and the collective
    fails at once, a message about that rank is printed before the error. The watchdog runs during `fit`, `validate` and
    `predict`, and does not change their results.

    Args:
        minutes: Minutes without progress; 0 disables the watchdog.
        folder: Folder of the records, shared by all ranks; None uses `ranks` under the trainer's root folder. Records are
            deleted at a normal end.
    """

    def __init__(self, minutes: float = 20.0, folder: Path | None = None) -> None:
        self.minutes, self.folder = minutes, folder
        self.interval_s = min(INTERVAL_S, 60 * minutes / 10)
        self._place, self._phase, self._step = (0, 0), "setting up", 0
        self._beat, self._idle, self._since = 0, 0.0, 0.0
        self._raised: list[traceback.FrameSummary] = []
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._records = Path()

    def note(self, trainer: L.Trainer, phase: str) -> None:
        """Record progress.

        Args:
            trainer: Provides the step.
            phase: The activity that begins.
        """
        self._place, self._phase = (self._place[0], self._place[1] + 1), phase
        self._step = trainer.global_step

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start the watchdog; the process group exists by now."""
        del pl_module, stage
        if not self.minutes or self._thread is not None:
            return
        self._records = self.folder or Path(trainer.default_root_dir) / "ranks"
        self._since, self._raised = time.time(), []
        self._place, self._step = (self._place[0] + 1, 0), trainer.global_step
        self._write()
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop the watchdog and delete the record."""
        del trainer, pl_module, stage
        self._leave("")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Report a rank that has exited, if any, and leave a record for the ranks that will wait for this one."""
        del trainer, pl_module
        if self._thread is None:
            return
        self._raised = traceback.extract_tb(exception.__traceback__)[-1:]
        if isinstance(exception, RuntimeError) and world_size() > 1:  # what a broken collective raises, among others
            records, silent = self._collect_records()
            if silent:
                self._print(f"{explain(records, silent)} (this is rank {rank()}, {type(exception).__name__})")
        self._leave("" if isinstance(exception, StopRequested) else f"ended with {type(exception).__name__}")

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record progress."""
        self.note(trainer, "sanity check")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record progress."""
        self.note(trainer, f"start of epoch {trainer.current_epoch}")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record progress, and start counting notes from this batch."""
        self._place = (self._place[0] + 1, 0)
        self.note(trainer, f"train batch {batch_idx}")

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Record progress."""
        self.note(trainer, f"backward after {self._phase}")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record progress."""
        self.note(trainer, self._phase.replace("backward after", "update after"))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record progress."""
        self.note(trainer, f"waiting for data after train batch {batch_idx}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record progress."""
        self.note(trainer, f"end of epoch {trainer.current_epoch}")

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record progress."""
        self.note(trainer, f"validation batch {batch_idx}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record progress."""
        self.note(trainer, "end of validation")

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record progress."""
        self.note(trainer, f"predict batch {batch_idx}")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record progress."""
        self.note(trainer, "end of prediction")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record progress, but not for the comparison of ranks, because not all ranks save."""
        self._phase = f"saving a checkpoint, after {self._phase.removeprefix('saving a checkpoint, after ')}"

    def _watch(self) -> None:
        seen, last = (self._place, self._phase), time.monotonic()
        while not self._stop.wait(self.interval_s):
            now = time.monotonic()
            self._idle, last = self._idle + min(now - last, 2 * self.interval_s), now
            if (self._place, self._phase) != seen:
                seen, self._idle = (self._place, self._phase), 0.0
            self._write()
            if self._idle >= 60 * self.minutes:
                self._end()

    def _end(self) -> None:
        records, silent = self._collect_records()
        self._write("stopped by its watchdog", hung=True)
        self._print(explain(records, silent))
        faulthandler.dump_traceback(file=2, all_threads=True)
        os._exit(HUNG)

    def _collect_records(self) -> tuple[dict[int, RankRecord | None], set[int]]:
        """Return all records, and the ranks that no longer write; takes up to 2.5 intervals."""
        first = read_records(self._records, world_size(), self._since)
        unsure = {one for one, record in first.items() if record is not None and not record.ended and one != rank()}
        end = time.monotonic() + 2.5 * self.interval_s
        while True:
            self._write()
            records = read_records(self._records, world_size(), self._since)
            for one in list(unsure):
                before, now = first[one], records[one]
                if now is None or before is None or now.ended or now.beat != before.beat:
                    unsure.discard(one)
            if not unsure or time.monotonic() >= end:
                return records, unsure
            time.sleep(self.interval_s / 4)

    def _write(self, ended: str = "", hung: bool = False) -> None:
        main = sys._current_frames()[threading.main_thread().ident or 0]
        frames = self._raised or traceback.extract_stack(main)
        frame = next(each for each in reversed(frames) if each.filename != __file__)
        at = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
        waiting = any(part in frame.filename for part in COLLECTIVES)
        with self._writing:
            self._beat += 1
            record = RankRecord(
                rank(), socket.gethostname(), os.getpid(), self._step, self._phase, self._place, at,
                waiting, round(self._idle, 3), self._beat, time.time(), ended, hung,
            )  # fmt: skip
            write_record(self._records, record)

    def _leave(self, ended: str) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join(self.interval_s)
        self._thread = None
        if ended:
            self._write(ended)
        else:
            record_file(self._records, rank()).unlink(missing_ok=True)

    def _print(self, message: str) -> None:
        print(f"ctx-distill: {message}", file=sys.stderr, flush=True)
