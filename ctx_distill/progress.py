"""The progress bar of the package."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(*more: TextColumn) -> Progress:
    """Return a bar with description, count, elapsed and remaining time, and then further columns."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), *more
    )  # fmt: skip
