"""The default learning-rate schedule, which follows the training progress for any number of ranks."""

from __future__ import annotations

import math

import numpy as np


class WarmupCosine:
    """Learning-rate factor: linear warm-up, then a half cosine to zero at the end of training.

    Positions are steps of the original run. When a run is resumed with another number of ranks, its epochs have another
    number of steps, and `resume` maps these to positions. Otherwise positions equal steps exactly. `LambdaLR` saves the
    attributes of this object in its state.

    Args:
        steps: Optimiser steps of the training.
        warmup: Warm-up steps.
    """

    def __init__(self, steps: int, warmup: int) -> None:
        self.steps, self.warmup = steps, warmup
        self.marks = [[0.0, 0.0], [float(steps), float(steps)]]

    def __call__(self, step: int) -> float:
        return warmup_cosine(self.position(step), self.steps, self.warmup)

    def position(self, step: int) -> float:
        """Return a step's position in the schedule, in steps of the original run."""
        steps, positions = zip(*self.marks, strict=True)
        return float(np.interp(step, steps, positions))

    def resume(self, step: int, in_epoch: int, later: int, epoch_ends: float) -> None:
        """Distribute the rest of the schedule over the remaining steps.

        Args:
            step: Optimiser steps so far.
            in_epoch: Steps remaining in the current epoch.
            later: Steps of the epochs after it.
            epoch_ends: Training progress, in [0, 1], at the end of the current epoch.
        """
        end = self.steps * epoch_ends if later else float(self.steps)
        self.marks = [[float(step), self.position(step)], [float(step + in_epoch), end]]
        if later:
            self.marks.append([float(step + in_epoch + later), float(self.steps)])


def warmup_cosine(step: float, steps: int, warmup: int) -> float:
    """Return the learning-rate factor at a step: linear warm-up, then a half cosine to zero at the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
