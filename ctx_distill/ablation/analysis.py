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
        seeds: number of seeds.
    """

    value: float
    low: float
    high: float
    p: float
    seeds: int


def crossed(
    values: Mapping[int, float], resampled: Mapping[int, Floats], draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """Return the mean over seeds with an interval over seeds and test patients, which are crossed.

    A draw takes seeds with replacement and one resampling of the patients for all of them (every run was scored on the same
    resamplings). This is the two-way bootstrap of crossed random effects (Owen 2007, "The pigeonhole
    bootstrap"); It is conservative if both vary little.

    Args:
        values: statistic by seed, on all patients.
        resampled: the statistic by seed for each resampling of the patients, (R,).
        draws: number of draws.
        seed: seed of the draws.

    Raises:
        ValueError: there are no seeds, the resamplings do not match, or the statistic is undefined in all of them
            (resamplings in which it is undefined are excluded).
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
    """Return the paired difference of two arms over their common seeds; a single-seed arm is compared with every seed.

    Args:
        values: values of both arms, by seed.
        resampled: resampled values of both arms, by seed.
        draws: number of draws.
        seed: seed of the draws.
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
    """Return Holm's step-down adjusted p values (Holm 1979), monotone and at most 1."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, (len(p_values) - place) * p))
        adjusted[name] = running
    return adjusted
