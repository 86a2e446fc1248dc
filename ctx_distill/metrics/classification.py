"""Multi-label classification scores: AUROC and average precision a finding, macro means, intervals over patients.

A label is 1 or 0; -1 (uncertain) and NaN (blank) are left out. A score that lacks one of the two classes is not
defined (None). Everything is written for weights (how often a row counts), so that all bootstrap replicates are
computed at once; with weights of one it agrees with scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctx_distill.metrics.bootstrap import Groups, Interval, interval, resample_counts

Floats = NDArray[np.float64]
_Score = Callable[[NDArray[np.bool_], Floats, Floats], Floats]


def per_study(study_ids: Groups, values: ArrayLike) -> tuple[list[Any], Floats, NDArray[np.intp]]:
    """The mean of predictions over the images of each study.

    Args:
        study_ids: N ids (strings or integers), one an image.
        values: (N,) or (N, F) probabilities.

    Returns:
        (ids of S studies in order of first appearance; their means, (S,) or (S, F) float64; the row of each study's
        first image, (S,), with which labels and patients are taken).

    Raises:
        ValueError: the two lengths differ.
    """
    array = np.asarray(values, dtype=np.float64)
    ids = np.asarray(study_ids)
    if len(ids) != len(array):
        raise ValueError(f"per_study: {len(ids)} study ids and {len(array)} rows of values, expected as many.")
    _, first, codes = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    place = place[codes.reshape(-1)]
    sums = np.zeros((len(order), *array.shape[1:]))
    np.add.at(sums, place, array)
    sizes = np.bincount(place, minlength=len(order)).reshape(-1, *([1] * (array.ndim - 1)))
    return ids[first[order]].tolist(), sums / sizes, first[order]


def _known(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], Floats, NDArray[np.bool_]]:
    """(labels that are 1, scores, which rows count) of one finding, checked."""
    y, s = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if y.shape != s.shape or y.ndim != 1:
        raise ValueError(f"labels have shape {y.shape} and scores {s.shape}, expected the same (N,).")
    known = (y == 0) | (y == 1)
    if not np.all(known | (y == -1) | np.isnan(y)):
        raise ValueError("labels hold values other than 1, 0, -1 and NaN.")
    if np.isnan(s[known]).any():
        raise ValueError("scores hold NaN: the model's output is not a number.")
    return y == 1, s, known


def _tie_sums(scores: Floats, order: NDArray[np.intp], weights: Floats) -> Floats:
    """Weights (R, N) in `order`, summed over runs of equal scores: (R, number of distinct scores)."""
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sums: Floats = np.add.reduceat(weights[:, order], starts, axis=1)
    return sums


def _weighted_auroc(positive: NDArray[np.bool_], scores: Floats, weights: Floats) -> Floats:
    """Mann-Whitney's U over n+ n-, ties counting half; (R,) for weights (R, N), NaN without both classes."""
    order = np.argsort(scores, kind="stable")
    up = _tie_sums(scores, order, weights * positive)
    down = _tie_sums(scores, order, weights * ~positive)
    below = np.cumsum(down, axis=1) - down
    pairs = up.sum(1) * down.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, (up * (below + 0.5 * down)).sum(1) / pairs, np.nan)


def _weighted_average_precision(positive: NDArray[np.bool_], scores: Floats, weights: Floats) -> Floats:
    """sum_k (R_k - R_{k-1}) P_k over distinct thresholds; (R,) for weights (R, N), NaN without both classes."""
    order = np.argsort(-scores, kind="stable")
    up = _tie_sums(scores, order, weights * positive)
    everything = np.cumsum(_tie_sums(scores, order, weights), axis=1)
    total = up.sum(1)
    both = (total > 0) & (everything[:, -1] > total)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(everything > 0, np.cumsum(up, axis=1) / everything, 0.0)
        return np.where(both, (up * precision).sum(1) / total, np.nan)


def _single(score: _Score, labels: ArrayLike, scores: ArrayLike) -> float | None:
    positive, s, known = _known(labels, scores)
    if not known.any():
        return None
    value = float(score(positive[known], s[known], np.ones((1, int(known.sum()))))[0])
    return None if np.isnan(value) else value


def auroc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Area under the ROC curve of one finding.

    Args:
        labels: (N,) of 1, 0, -1 or NaN; the last two are left out.
        scores: (N,), larger where the finding is more likely; ties count half.

    Returns:
        In [0, 1]; None without both classes.

    Raises:
        ValueError: shapes that differ, other labels, or a NaN score where a label is known.
    """
    return _single(_weighted_auroc, labels, scores)


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Average precision of one finding (not interpolated, as scikit-learn's); arguments and errors as `auroc`."""
    return _single(_weighted_average_precision, labels, scores)


def _columns(labels: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    y, s = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if y.ndim != 2 or y.shape != s.shape:
        raise ValueError(f"labels have shape {y.shape} and scores {s.shape}, expected the same (N, F).")
    return y, s


def macro_auroc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """The mean AUROC over the findings of (N, F) labels that have both classes; None where none has.

    Raises:
        ValueError: as `auroc`.
    """
    y, s = _columns(labels, scores)
    values = [value for f in range(y.shape[1]) if (value := auroc(y[:, f], s[:, f])) is not None]
    return float(np.mean(values)) if values else None


def _replicates(score: _Score, y: Floats, s: Floats, counts: NDArray[np.integer[Any]]) -> tuple[Floats, Floats]:
    """(values (F,), replicates (R, F)) of a score, NaN where not defined. Replicates run in blocks to save memory."""
    n = len(counts)
    values, replicates = np.full(y.shape[1], np.nan), np.full((n, y.shape[1]), np.nan)
    block = max(1, 4_000_000 // max(1, len(y)))
    for f in range(y.shape[1]):
        positive, column, known = _known(y[:, f], s[:, f])
        if not known.any():
            continue
        positive, column = positive[known], column[known]
        values[f] = score(positive, column, np.ones((1, len(column))))[0]
        if np.isnan(values[f]):
            continue
        for start in range(0, n, block):
            rows = slice(start, start + block)
            replicates[rows, f] = score(positive, column, counts[rows][:, known].astype(np.float64))
    return values, replicates


def _macro_replicates(values: Floats, replicates: Floats) -> Floats:
    """(R,) means over the defined findings of (R, F); a finding is left out of a replicate that lacks a class."""
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
    """AUROC a finding, and the macro AUROC under given resamplings, so that several models see the same draws.

    Args:
        labels: (N, F) of 1, 0, -1 or NaN.
        scores: (N, F).
        counts: (R, N), how often each row is drawn (`resample_counts`).

    Returns:
        (F,) values and (R,) macro means over the findings that are defined, NaN where none is.
    """
    y, s = _columns(labels, scores)
    values, replicates = _replicates(_weighted_auroc, y, s, counts)
    return values, _macro_replicates(values, replicates)


def macro_average_precision_replicates(
    labels: ArrayLike, scores: ArrayLike, counts: NDArray[np.integer[Any]]
) -> tuple[Floats, Floats]:
    """Average precision as `macro_auroc_replicates` gives AUROC."""
    y, s = _columns(labels, scores)
    values, replicates = _replicates(_weighted_average_precision, y, s, counts)
    return values, _macro_replicates(values, replicates)


def classification_report(
    labels: ArrayLike,
    scores: ArrayLike,
    names: Sequence[str],
    patients: Groups,
    seed: int = 0,
    n: int = 1000,
) -> dict[str, Any]:
    """Scores of a multi-label classifier, one row a study.

    Args:
        labels: (N, F) of 1, 0, -1 or NaN.
        scores: (N, F) probabilities or any monotone scores.
        names: F findings.
        patients: N patient ids, the unit of resampling.
        seed: of the bootstrap.
        n: replicates.

    Returns:
        `macro_auroc` (value, low, high, or None), `per_finding` {name: the same, or None without both classes},
        `macro_average_precision`, `per_finding_average_precision`, `positives` and `negatives` {name: count},
        `studies`, `patients`, `findings_scored`. A replicate in which a finding lacks a class is left out of that
        finding's interval, and the finding out of that replicate's macro mean.

    Raises:
        ValueError: lengths that do not fit, other labels, or NaN scores.
    """
    y, s = _columns(labels, scores)
    if len(names) != y.shape[1] or len(patients) != len(y):
        raise ValueError(
            f"classification_report: labels are {y.shape}, but {len(names)} names and {len(patients)} patients are given."
        )
    counts = resample_counts(patients, n, seed)
    roc, roc_replicates = _replicates(_weighted_auroc, y, s, counts)
    precision, precision_replicates = _replicates(_weighted_average_precision, y, s, counts)

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
