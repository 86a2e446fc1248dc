"""How a training stage survives: when it writes checkpoints, what it makes of a bad loss, when it calls a rank hung."""

from __future__ import annotations

from dataclasses import dataclass

from ctx_distill.errors import InputError


@dataclass(frozen=True)
class SurvivalSettings:
    """Settings that every training stage shares; they change nothing of a run that meets no fault.

    Attributes:
        checkpoint_minutes: a checkpoint is written after every epoch, and within an epoch after so many minutes.
        explosion: a gradient whose norm is over so many times the median of the last ones counts as exploding.
        largest_skips: bad steps (NaN, infinite or exploding) in a row after which the run stops with a dump.
        back_off: factor of the learning rate after a bad step; it returns over the next good steps.
        hang_minutes: a rank without a step for so long ends the run with an error that names it; 0 switches it off.
    """

    checkpoint_minutes: float = 15.0
    explosion: float = 100.0
    largest_skips: int = 10
    back_off: float = 0.5
    hang_minutes: float = 20.0

    def __post_init__(self) -> None:
        if not (
            self.checkpoint_minutes > 0
            and self.explosion > 1
            and self.largest_skips > 0
            and 0 < self.back_off <= 1
            and self.hang_minutes >= 0
        ):
            raise InputError(
                f"survival: {self}; expected checkpoint_minutes above 0, explosion above 1, largest_skips of 1 or more, "
                "back_off over 0 and up to 1, hang_minutes of 0 or more."
            )
