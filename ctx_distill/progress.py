"""Progress of long work: a bar on a terminal, and in a log a line now and then with the time that is left."""

from __future__ import annotations

import sys
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY_S = 15.0
"""Seconds between two lines."""


class LogLine:
    """Prints `TITLE 30/120, 0:45 left` at most every `EVERY_S` seconds; on a terminal, which shows a bar, nothing.

    Args:
        title: what is counted.
        total: number of items.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self._silent = sys.stdout.isatty()
        self._started = self._printed = time.monotonic()

    def advance(self) -> None:
        """Count one more item."""
        self.done += 1
        now = time.monotonic()
        if not self._silent and now - self._printed >= EVERY_S:
            left = time_left(now - self._started, self.done, self.total)
            print(f"{self.title} {self.done}/{self.total}, {left} left", flush=True)
            self._printed = now


def time_left(elapsed: float, done: int, total: int) -> str:
    """Return the time that the remaining items take at the same rate, as h:mm:ss or m:ss.

    Args:
        elapsed: seconds so far.
        done: items so far, at least 1.
        total: items in all.
    """
    seconds = round(elapsed / done * (total - done))
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"


def progress_bar(*more: TextColumn) -> Progress:
    """Return a bar with description, count, elapsed and remaining time, and then further columns."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), *more
    )  # fmt: skip
