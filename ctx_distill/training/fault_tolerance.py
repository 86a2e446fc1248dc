"""Settings of fault tolerance: checkpoint interval, limit of skipped steps, hang timeout."""

from __future__ import annotations

from dataclasses import dataclass

from ctx_distill.errors import InputError

REMOVED = {
    "explosion": "a finite gradient is never skipped now; trainer.gradient_clip_val clips a large one",
    "back_off": "a skipped step no longer changes the learning rate",
}
"""Removed settings, and why they were removed."""


@dataclass(frozen=True)
class SurvivalSettings:
    """Fault tolerance of a training stage; the settings have no effect on a run without faults.

    Attributes:
        checkpoint_minutes: Minutes between checkpoints within an epoch; one is also written after every epoch.
        largest_skips: Consecutive steps with a non-finite loss or gradient after which the run fails.
        hang_minutes: Minutes without progress after which the run fails and reports the hung rank; 0 disables it.

    Raises:
        InputError: a value is out of range.
    """

    checkpoint_minutes: float = 15.0
    largest_skips: int = 10
    hang_minutes: float = 20.0

    def __post_init__(self) -> None:
        if not (self.checkpoint_minutes > 0 and self.largest_skips > 0 and self.hang_minutes >= 0):
            raise InputError(
                f"survival: {self}; expected checkpoint_minutes above 0, largest_skips of 1 or more, and hang_minutes of 0 "
                "or more."
            )
