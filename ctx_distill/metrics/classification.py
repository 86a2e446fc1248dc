"""Multi-label classification scores: AUROC and average precision per finding, macro means, intervals over patients.

A label is 1 or 0; rows with -1 (uncertain) or NaN (blank) are excluded. A score is undefined (None) unless both classes occur.
torchmetrics computes the values. The bootstrap replicates are computed here, because its functions for curves take no
sample weights and its `BootStrapper` resamples rows: we resample patients, and weights (how often a row is drawn) give all
replicates at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctx_distill.metrics.bootstrap import Groups, Interval, interval, resample_counts

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Score:
    """A score of one finding.

    Attributes:
        name: of torchmetrics' function of scores and labels, both (N,).
        weighted: the same for rows that count `weights` (R, N) times; (R,), NaN without both classes.
    """

    name: str
    weighted: Callable[[NDArray[np.bool_], Floats, Floats], Floats]


def _known(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], Floats, NDArray[np.bool_]]:
    """Check one finding; return which labels are 1, the scores, and which rows count."""
    y, s = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if y.shape != s.shape or y.ndim != 1:
        raise ValueError(f"labels have shape {y.shape} and scores {s.shape}, expected the same shape (N,).")
    known = (y == 0) | (y == 1)
    if not np.all(known | (y == -1) | np.isnan(y)):
        raise ValueError("labels contain values other than 1, 0, -1 and NaN.")
    if np.isnan(s[known]).any():
        raise ValueError("scores contain NaN for rows with a known label.")
    return y == 1, s, known


def _tie_sums(scores: Floats, order: NDArray[np.intp], weights: Floats) -> Floats:
    """Return weights (R, N) in `order`, summed over runs of equal scores: (R, number of distinct scores)."""
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sums: Floats = np.add.reduceat(weights[:, order], starts, axis=1)
    return sums


def _weighted_auroc(positive: NDArray[np.bool_], scores: Floats, weights: Floats) -> Floats:
    """Return Mann-Whitney's U over n+ n-, where ties count half; see `_Score.weighted`."""
    order = np.argsort(scores, kind="stable")
    up = _tie_sums(scores, order, weights * positive)
    down = _tie_sums(scores, order, weights * ~positive)
    below = np.cumsum(down, axis=1) - down
    pairs = up.sum(1) * down.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, (up * (below + 0.5 * down)).sum(1) / pairs, np.nan)


def _weighted_average_precision(positive: NDArray[np.bool_], scores: Floats, weights: Floats) -> Floats:
    """Return sum_k (R_k - R_{k-1}) P_k over distinct thresholds; see `_Score.weighted`."""
    order = np.argsort(-scores, kind="stable")
    up = _tie_sums(scores, order, weights * positive)
    everything = np.cumsum(_tie_sums(scores, order, weights), axis=1)
    total = up.sum(1)
    both = (total > 0) & (everything[:, -1] > total)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(everything > 0, np.cumsum(up, axis=1) / everything, 0.0)
        return np.where(both, (up * precision).sum(1) / total, np.nan)


_AUROC = _Score("binary_auroc", _weighted_auroc)
_AVERAGE_PRECISION = _Score("binary_average_precision", _weighted_average_precision)


def _value(score: _Score, labels: ArrayLike, scores: ArrayLike) -> float:
    """Return the score of one finding, NaN without both classes."""
    import torch  # here, so that pages are written without it
    from torchmetrics.functional import classification

    positive, s, known = _known(labels, scores)
    positive, s = positive[known], s[known]
    if not positive.any() or positive.all():
        return float("nan")
    # Ranks: torchmetrics would pass scores outside [0, 1] through a sigmoid, which can make distinct ones equal.
    ranks = np.unique(s, return_inverse=True)[1] / len(s)
    function = getattr(classification, score.name)
    return float(function(torch.from_numpy(ranks), torch.from_numpy(positive.astype(np.int64))))


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def auroc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Return the area under the ROC curve of one finding.

    Args:
        labels: (N,) of 1, 0, -1 or NaN; rows with the last two are excluded.
        scores: (N,), larger where the finding is more likely; ties count half.

    Returns:
        In [0, 1]; None without both classes.

    Raises:
        ValueError: the shapes differ, a label has another value, or a score is NaN where the label is known.
    """
    return _or_none(_value(_AUROC, labels, scores))


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Return the average precision of one finding, not interpolated; arguments and errors as for `auroc`."""
    return _or_none(_value(_AVERAGE_PRECISION, labels, scores))


def _columns(labels: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    y, s = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if y.ndim != 2 or y.shape != s.shape:
        raise ValueError(f"labels have shape {y.shape} and scores {s.shape}, expected the same shape (N, F).")
    return y, s


def macro_auroc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Return the mean AUROC over the findings of (N, F) labels that have both classes; None if there are none.

    Raises:
        ValueError: as `auroc`.
    """
    y, s = _columns(labels, scores)
    values = [value for f in range(y.shape[1]) if (value := auroc(y[:, f], s[:, f])) is not None]
    return float(np.mean(values)) if values else None


def _replicates(score: _Score, y: Floats, s: Floats, counts: NDArray[np.integer[Any]]) -> tuple[Floats, Floats]:
    """Return a score's values (F,) and replicates (R, F), NaN where undefined; in blocks, to save memory."""
    n = len(counts)
    values, replicates = np.full(y.shape[1], np.nan), np.full((n, y.shape[1]), np.nan)
    block = max(1, 4_000_000 // max(1, len(y)))
    for f in range(y.shape[1]):
        values[f] = _value(score, y[:, f], s[:, f])
        if np.isnan(values[f]):
            continue
        positive, column, known = _known(y[:, f], s[:, f])
        for start in range(0, n, block):
            rows = slice(start, start + block)
            weights = counts[rows][:, known].astype(np.float64)
            replicates[rows, f] = score.weighted(positive[known], column[known], weights)
    return values, replicates


def _macro_replicates(values: Floats, replicates: Floats) -> Floats:
    """Return means (R,) over the defined findings of (R, F); replicates that lack a class exclude the finding."""
    kept = replicates[:, ~np.isnan(values)]
    present = ~np.isnan(kept)
    sizes = present.sum(1)
    means: Floats = np.where(sizes > 0, np.where(present, kept, 0.0).sum(1) / np.maximum(sizes, 1), np.nan)
    return means


def _macro(values: Floats, replicates: Floats) -> Interval:
    if np.isnan(values).all():
        return Interval(None)
    return interval(float(values[~np.isnan(values)].mean()), _macro_replicates(values, replicates))


def macro_auroc_replicates(
    labels: ArrayLike, scores: ArrayLike, counts: NDArray[np.integer[Any]]
) -> tuple[Floats, Floats]:
    """Return AUROC per finding, and replicates of the macro AUROC for given draws, which several models can share.

    Args:
        labels: (N, F) of 1, 0, -1 or NaN.
        scores: (N, F).
        counts: (R, N), how often each row is drawn (`resample_counts`).

    Returns:
        Values (F,), NaN where undefined, and macro means (R,) over the defined findings, NaN if there are none.
    """
    y, s = _columns(labels, scores)
    values, replicates = _replicates(_AUROC, y, s, counts)
    return values, _macro_replicates(values, replicates)


def macro_average_precision_replicates(
    labels: ArrayLike, scores: ArrayLike, counts: NDArray[np.integer[Any]]
) -> tuple[Floats, Floats]:
    """Return what `macro_auroc_replicates` returns, for average precision."""
    y, s = _columns(labels, scores)
    values, replicates = _replicates(_AVERAGE_PRECISION, y, s, counts)
    return values, _macro_replicates(values, replicates)


def classification_report(
    labels: ArrayLike,
    scores: ArrayLike,
    names: Sequence[str],
    patients: Groups,
    seed: int = 0,
    n: int = 1000,
) -> dict[str, Any]:
    """Return the scores of a multi-label classifier, with one row per study.

    Args:
        labels: (N, F) of 1, 0, -1 or NaN.
        scores: (N, F) probabilities or any monotone scores.
        names: F findings.
        patients: N patient ids, the unit of resampling.
        seed: seed of the bootstrap.
        n: number of replicates.

    Returns:
        `macro_auroc` (value, low, high, or None), `per_finding` {name: the same, or None without both classes},
        `macro_average_precision`, `per_finding_average_precision`, `positives` and `negatives` {name: count},
        `studies`, `patients`, `findings_scored`. If a finding lacks a class in a replicate, its interval excludes the
        replicate, and the replicate's macro mean excludes the finding.

    Raises:
        ValueError: lengths differ, a label has another value, or a score is NaN.
    """
    y, s = _columns(labels, scores)
    if len(names) != y.shape[1] or len(patients) != len(y):
        raise ValueError(
            f"classification_report: labels are {y.shape}, but {len(names)} names and {len(patients)} patients were given."
        )
    counts = resample_counts(patients, n, seed)
    roc, roc_replicates = _replicates(_AUROC, y, s, counts)
    precision, precision_replicates = _replicates(_AVERAGE_PRECISION, y, s, counts)

    def each(values: Floats, replicates: Floats) -> dict[str, dict[str, float] | None]:
        return {name: interval(values[f], replicates[:, f]).as_json() for f, name in enumerate(names)}

    return {
        "macro_auroc": _macro(roc, roc_replicates).as_json(),
        "per_finding": each(roc, roc_replicates),
        "macro_average_precision": _macro(precision, precision_replicates).as_json(),
        "per_finding_average_precision": each(precision, precision_replicates),
        "positives": {name: int((y[:, f] == 1).sum()) for f, name in enumerate(names)},
        "negatives": {name: int((y[:, f] == 0).sum()) for f, name in enumerate(names)},
        "studies": len(y),
        "patients": len(set(np.asarray(patients).tolist())),
        "findings_scored": int((~np.isnan(roc)).sum()),
    }
