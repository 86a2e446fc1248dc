"""Logs of a resumed run: keep each step once in the CSV log and in TensorBoard."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from ctx_distill.files import write_bytes


def cut_logs(trainer: L.Trainer, curves: Path, step: int) -> Path:
    """Cut the logs back to the restored step, and move earlier rows to a second file until training is over.

    Only rank 0 cuts. The rank is taken from the trainer, because there is no process group yet. Lightning's CSV logger
    starts a new file in a resumed run; TensorBoard purges later steps.

    Args:
        trainer: The trainer with its loggers.
        curves: The CSV logger's table.
        step: Number of optimiser steps to keep.

    Returns:
        The file of the kept rows, for `join_history`.
    """
    history = curves.with_name("metrics.before.csv")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and step:
            logger._kwargs["purge_step"] = step
    if not trainer.is_global_zero or not (curves.is_file() or history.is_file()):
        return history
    join_history(history, curves)
    kept = [row for row in _logged_rows(curves) if int(row["step"]) < step]
    if kept:
        _write_rows(history, kept)
    curves.unlink()
    return history


def join_history(history: Path, curves: Path) -> None:
    """Prepend the rows from before a resume, except those of repeated steps."""
    if not history.is_file():
        return
    before, since = _logged_rows(history), _logged_rows(curves)
    first = min((int(row["step"]) for row in since), default=math.inf)
    _write_rows(curves, [row for row in before if int(row["step"]) < first] + since)
    history.unlink()


def _logged_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV log; an empty list if the file does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as the CSV logger does, with sorted columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, sorted({name for row in rows for name in row}))
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())
