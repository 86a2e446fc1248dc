"""Means and differences with intervals over test patients and seeds, and Holm's correction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
DRAWS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, or a mean of paired differences.

    Attributes:
        value: the mean.
        low: end of the 95 % interval.
        high: the other end.
        p: two-sided p of "no difference" from the same resamples; of a mean: NaN.
        seeds: how many it rests on.
    """

    value: float
    low: float
    high: float
    p: float
    seeds: int


def crossed(
    values: Mapping[int, float], resampled: Mapping[int, Floats], draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """The mean over seeds with an interval over seeds and test patients, which are crossed.

    A draw takes seeds with replacement and, for all of them alike, one resampling of the patients (every run was scored
    under the same resamplings). This is the two-way bootstrap of crossed random effects (Owen 2007, "The pigeonhole
    bootstrap"); it is conservative where both vary little.

    Args:
        values: by seed, on all patients.
        resampled: by seed, (R,) the same statistic under each resampling of the patients.
        draws: number of draws.
        seed: of the draws.

    Raises:
        ValueError: no seeds, resamplings that do not fit, or none that defines the statistic (those that do not are left
            out).
    """
    seeds = sorted(values)
    if not seeds or sorted(resampled) != seeds:
        raise ValueError(f"crossed: values of seeds {seeds}, resamplings of seeds {sorted(resampled)}")
    table = np.stack([resampled[number] for number in seeds])  # (S, R)
    table = table[:, ~np.isnan(table).any(axis=0)]
    if not table.shape[1]:
        raise ValueError("crossed: no resampling of the patients defines the statistic; score more patients")
    rng = np.random.default_rng(seed)
    columns = rng.integers(table.shape[1], size=draws)
    rows = rng.integers(len(seeds), size=(draws, len(seeds)))
    means = table[rows, columns[:, None]].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    # the smallest share that n draws can show is 1 / (n + 1): a p of 0 is never claimed
    tail = min((means <= 0).sum(), (means >= 0).sum())
    return Estimate(
        float(np.mean([values[number] for number in seeds])), float(low), float(high),
        float(min(1.0, 2 * (tail + 1) / (draws + 1))), len(seeds),
    )  # fmt: skip


def difference(
    values: tuple[Mapping[int, float], Mapping[int, float]],
    resampled: tuple[Mapping[int, Floats], Mapping[int, Floats]],
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """The paired difference of two arms over the seeds that both have; an arm with one seed alone is set against all.

    Args:
        values: of both arms.
        resampled: of both arms.
        draws: number of draws.
        seed: of the draws.
    """
    first, second = values
    seeds = sorted(set(first) & set(second))
    if len(second) == 1 and len(first) > 1:  # not trained: the same for every seed
        (only,) = second
        seeds = sorted(first)
        second = dict.fromkeys(seeds, second[only])
        resampled = resampled[0], dict.fromkeys(seeds, resampled[1][only])
    return crossed(
        {number: first[number] - second[number] for number in seeds},
        {number: resampled[0][number] - resampled[1][number] for number in seeds},
        draws, seed,
    )  # fmt: skip


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p values (Holm 1979), at most 1 and monotone."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, (len(p_values) - place) * p))
        adjusted[name] = running
    return adjusted
