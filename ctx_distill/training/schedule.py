"""The default learning-rate schedule: a function of the share of the training that is done, at any number of ranks."""

from __future__ import annotations

import math

import numpy as np


class WarmupCosine:
    """Factor of the learning rate: linear warm-up, then half a cosine to zero at the end of the training.

    It counts in steps of the run as it began. Where a run is resumed with another number of ranks, its epochs have
    another number of steps, and `resume` maps those to positions in the schedule. `LambdaLR` saves the attributes of such
    an object in its own state, and a run that is not resumed so has positions that are its steps, to the bit.

    Args:
        steps: optimiser steps of the training.
        warmup: of them, those that warm up.
    """

    def __init__(self, steps: int, warmup: int) -> None:
        self.steps, self.warmup = steps, warmup
        self.marks = [[0.0, 0.0], [float(steps), float(steps)]]

    def __call__(self, step: int) -> float:
        return warmup_cosine(self.position(step), self.steps, self.warmup)

    def position(self, step: int) -> float:
        """Where in the schedule a step is, in steps of the run as it began."""
        steps, positions = zip(*self.marks, strict=True)
        return float(np.interp(step, steps, positions))

    def resume(self, step: int, in_epoch: int, later: int, epoch_ends: float) -> None:
        """Spread what is left of the schedule over the steps that are left.

        Args:
            step: optimiser steps so far.
            in_epoch: steps that are left of the epoch at hand.
            later: steps of the epochs after it.
            epoch_ends: share of the training that is done when the epoch at hand is.
        """
        end = self.steps * epoch_ends if later else float(self.steps)
        self.marks = [[float(step), self.position(step)], [float(step + in_epoch), end]]
        if later:
            self.marks.append([float(step + in_epoch + later), float(self.steps)])


def warmup_cosine(step: float, steps: int, warmup: int) -> float:
    """Factor of the learning rate at a step: linear warm-up, then half a cosine to zero at the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
