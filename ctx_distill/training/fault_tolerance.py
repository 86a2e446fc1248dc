"""Fault tolerance of a training stage: how often it writes checkpoints, when it gives up, when it calls a rank hung."""

from __future__ import annotations

from dataclasses import dataclass

from ctx_distill.errors import InputError

REMOVED = {
    "explosion": "a finite gradient is never skipped now; trainer.gradient_clip_val clips a large one",
    "back_off": "the learning rate is the schedule's after a skipped step",
}
"""Former settings, and why they are gone."""


@dataclass(frozen=True)
class SurvivalSettings:
    """Settings that every training stage shares; they change nothing of a run that meets no fault.

    Attributes:
        checkpoint_minutes: a checkpoint is written after every epoch, and within an epoch after so many minutes.
        largest_skips: steps in a row with a loss or gradient that is not finite after which the run ends with an error.
        hang_minutes: a rank without a step for so long ends the run with an error that names it; 0 switches it off.
    """

    checkpoint_minutes: float = 15.0
    largest_skips: int = 10
    hang_minutes: float = 20.0

    def __post_init__(self) -> None:
        if not (self.checkpoint_minutes > 0 and self.largest_skips > 0 and self.hang_minutes >= 0):
            raise InputError(
                f"survival: {self}; expected checkpoint_minutes above 0, largest_skips of 1 or more, hang_minutes of 0 "
                "or more."
            )
