"""95 % intervals from resampled patients (the cluster bootstrap), for any statistic and faster for weighted ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Groups = Sequence[str] | Sequence[int] | NDArray[np.generic]


@dataclass(frozen=True)
class Interval:
    """A statistic with its percentile interval; None if it is undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def as_json(self) -> dict[str, float] | None:
        """Return {"value", "low", "high"} as in `metrics.json`; None (null) if the value is undefined."""
        if self.value is None or self.low is None or self.high is None:
            return None
        return {"value": self.value, "low": self.low, "high": self.high}


def show(value: Any) -> str:
    """Return a metric of `metrics.json` as text: `0.731 [0.702, 0.760]`, `0.731`, or `-` if it is undefined."""
    if isinstance(value, Mapping):
        if value.get("value") is None:
            return "-"
        return f"{show(value['value'])} [{show(value['low'])}, {show(value['high'])}]"
    return "-" if value is None else f"{value:.3f}"


def ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the quotient, NaN where the denominator is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        result: NDArray[np.float64] = np.where(denominator > 0, numerator / denominator, np.nan)
    return result


def resample_counts(groups: Groups, n: int = 1000, seed: int = 0) -> NDArray[np.int32]:
    """Return how often each row is drawn in each replicate when groups are drawn with replacement, (n, N) int32.

    Args:
        groups: N patient ids; the rows of one patient are drawn together.
        n: number of replicates.
        seed: seed of the draws; equal groups and seeds give equal draws, so intervals of one table are comparable.

    Raises:
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"resample_counts: n is {n}; expected 1 or more replicates.")
    keys = tuple(np.asarray(groups).tolist())
    return _counts(keys, n, seed)


@functools.lru_cache(maxsize=4)
def _counts(groups: tuple[object, ...], n: int, seed: int) -> NDArray[np.int32]:
    codes = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    total = int(codes.max()) + 1 if len(codes) else 0
    rng = np.random.default_rng(seed)
    drawn = np.zeros((n, total), dtype=np.int32)
    if total:
        for row in drawn:
            row[:] = np.bincount(rng.integers(total, size=total), minlength=total)
    counts = drawn[:, codes]
    counts.setflags(write=False)  # shared by the cache
    return counts


def interval(value: float | None, replicates: ArrayLike, level: float = 0.95) -> Interval:
    """Return a value with the percentile interval of its replicates.

    Args:
        value: the statistic of the sample; None or NaN gives an Interval of None.
        replicates: (n,); replicates that are NaN (undefined) are excluded.
        level: coverage, between 0 and 1.

    Raises:
        ValueError: level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"interval: level is {level}; expected a number between 0 and 1.")
    if value is None or math.isnan(value):
        return Interval(None)
    defined = np.asarray(replicates, dtype=np.float64)
    defined = defined[~np.isnan(defined)]
    if not len(defined):
        return Interval(float(value))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], float | None],
    groups: Groups,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return a statistic with its interval over patients.

    Args:
        statistic: takes row indices (twice if the patient is drawn twice) and returns a number, or None or NaN if it
            is undefined.
        groups: N patient ids, one per row.
        n: number of replicates.
        seed: seed of the draws.
        level: coverage.

    Returns:
        The statistic of all rows and its percentile interval; replicates in which it is undefined are excluded.
    """
    rows = np.arange(len(groups), dtype=np.intp)
    value = statistic(rows) if len(rows) else None
    if value is None or math.isnan(value):
        return Interval(None)
    replicates = []
    for counts in resample_counts(groups, n, seed):
        replicate = statistic(np.repeat(rows, counts))
        replicates.append(math.nan if replicate is None else float(replicate))
    return interval(value, replicates, level)


def bootstrap_mean(values: ArrayLike, groups: Groups, n: int = 1000, seed: int = 0, level: float = 0.95) -> Interval:
    """Return the mean of N values with its interval over patients; undefined if N is 0.

    Args:
        values: (N,) numbers without NaN.
        groups: N patient ids.
        n: number of replicates.
        seed: seed of the draws.
        level: coverage.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers):
        return Interval(None)
    counts = resample_counts(groups, n, seed)
    return interval(float(numbers.mean()), counts @ numbers / counts.sum(1), level)
