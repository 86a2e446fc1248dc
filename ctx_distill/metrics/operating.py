"""Scores at a threshold and calibration of a multi-label classifier, with all bootstrap replicates.

Thresholds are chosen on `val` by the rule that CT-CLIP and fVLM apply to the evaluation set itself: the ROC point nearest to
(0, 1). A finding is called present if its probability is at or above the threshold. Labels are 1 or 0; rows with -1
(uncertain) or NaN (blank) are excluded.

torchmetrics computes the values at thresholds. The replicates over patients are weighted counts, which it has no
function for. The calibration error stays here too: `BinaryCalibrationError` puts a probability on the edge of two bins
into the upper one, scikit-learn and the figures published so far into the lower one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctx_distill.metrics.bootstrap import ratio

Floats = NDArray[np.float64]
Scores = dict[str, tuple[Floats, Floats]]
"""Measure -> (values (F,), replicates (R, F)), NaN where not defined."""
BINS = 10
_AT_THRESHOLD: dict[str, tuple[str, dict[str, Any]]] = {
    "f1": ("binary_f1_score", {}),
    "weighted_f1": ("multiclass_f1_score", {"num_classes": 2, "average": "weighted"}),
    "accuracy": ("binary_accuracy", {}),
    "sensitivity": ("binary_recall", {}),
    "specificity": ("binary_specificity", {}),
}
"""Measure -> torchmetrics' function and its settings."""
THRESHOLD_RULE = (
    "the val probability whose ROC point is nearest to (0, 1), present at or above it; chosen on val alone, never on the "
    "studies that are scored"
)


@dataclass(frozen=True)
class Threshold:
    """The threshold of a finding, or None with the reason."""

    value: float | None
    reason: str | None = None


def choose_thresholds(labels: ArrayLike, scores: ArrayLike) -> list[Threshold]:
    """Return, per finding, the score whose ROC point is nearest to (0, 1); the largest score of equally near ones.

    Args:
        labels: (N, F) labels of the validation studies.
        scores: (N, F) probabilities.

    Returns:
        F thresholds; None if a class is missing.
    """
    y, s = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    return [_nearest_to_corner(y[:, f], s[:, f]) for f in range(y.shape[1])]


def _nearest_to_corner(y: Floats, s: Floats) -> Threshold:
    positives, negatives = int((y == 1).sum()), int((y == 0).sum())
    if not positives or not negatives:
        return Threshold(None, f"val has {positives} studies with and {negatives} without the finding; both are needed")
    candidates = np.unique(s[(y == 1) | (y == 0)])[::-1]
    sensitivity = np.array([(s[y == 1] >= t).sum() for t in candidates]) / positives
    false_positive = np.array([(s[y == 0] >= t).sum() for t in candidates]) / negatives
    distance = np.hypot(1 - sensitivity, false_positive)
    return Threshold(float(candidates[int(np.argmin(np.round(distance, 12)))]))


def _weights(counts: NDArray[np.integer[Any]], rows: int) -> Floats:
    """Return (1 + R, N) weights: those of the sample, then those of its replicates."""
    return np.concatenate([np.ones((1, rows)), counts.astype(np.float64)])


def operating_scores(
    labels: ArrayLike, scores: ArrayLike, thresholds: Sequence[float | None], counts: NDArray[np.integer[Any]]
) -> Scores:
    """Return `f1`, `weighted_f1`, `accuracy`, `sensitivity` and `specificity` at given thresholds.

    `weighted_f1` is fVLM's: the F1 of presence and the F1 of absence, weighted by how many studies have each (scikit-learn's
    `average="weighted"` for one finding). A measure is NaN without a threshold. F1 and sensitivity are also NaN without a
    positive study, and specificity without a negative one.

    Args:
        labels: (N, F).
        scores: (N, F).
        thresholds: F.
        counts: (R, N), see `resample_counts`.
    """
    y, s = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    at = np.array([np.nan if value is None else value for value in thresholds])
    called, w = s >= at, _weights(counts, len(y))
    tp, fp = w @ ((y == 1) & called), w @ ((y == 0) & called)
    fn, tn = w @ ((y == 1) & ~called), w @ ((y == 0) & ~called)
    present, absent = tp + fn, tn + fp
    f1 = np.where(present > 0, ratio(2 * tp, 2 * tp + fp + fn), np.nan)
    f1_absent = np.nan_to_num(ratio(2 * tn, 2 * tn + fp + fn))
    found = {
        "f1": f1,
        "weighted_f1": ratio(present * np.nan_to_num(f1) + absent * f1_absent, present + absent),
        "accuracy": ratio(tp + tn, present + absent),
        "sensitivity": ratio(tp, present),
        "specificity": ratio(tn, absent),
    }
    for values in found.values():
        values[:, np.isnan(at)] = np.nan
    return {name: (_of_sample(name, y, called, values[0]), values[1:]) for name, values in found.items()}


def _of_sample(name: str, y: Floats, called: NDArray[np.bool_], counted: Floats) -> Floats:
    """Return torchmetrics' value per finding (F,) where `counted` is defined, else NaN."""
    import torch  # here, so that pages are written without it
    from torchmetrics.functional import classification

    function, settings = _AT_THRESHOLD[name]
    values = np.full_like(counted, np.nan)
    for f in np.flatnonzero(~np.isnan(counted)):
        known = (y[:, f] == 0) | (y[:, f] == 1)
        predicted, true = (torch.from_numpy(part[known, f].astype(np.int64)) for part in (called, y))
        values[f] = float(getattr(classification, function)(predicted, true, **settings))
    return values


def calibration_scores(labels: ArrayLike, scores: ArrayLike, counts: NDArray[np.integer[Any]]) -> Scores:
    """Return `brier` and `ece`, the Brier score and the expected calibration error of probabilities of presence.

    The latter is sum_b n_b / n |mean probability - share present| over ten equal bins of [0, 1]. A value on an edge is in
    the lower bin, as in scikit-learn's `calibration_curve`.

    Args:
        labels: (N, F).
        scores: (N, F) in [0, 1].
        counts: (R, N).
    """
    y, s = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    w = _weights(counts, len(y))
    known = (y == 0) | (y == 1)
    total = w @ known
    brier = ratio(w @ np.where(known, (s - (y == 1)) ** 2, 0.0), total)
    ece = np.empty_like(brier)
    for f in range(y.shape[1]):
        inside = (_bins(s[:, f])[:, None] == np.arange(BINS)) & known[:, f, None]
        gap = np.where(inside, (s[:, f] - (y[:, f] == 1))[:, None], 0.0)
        ece[:, f] = ratio(np.abs(w @ gap).sum(1), total[:, f])
    return {"brier": (brier[0], brier[1:]), "ece": (ece[0], ece[1:])}


def _bins(scores: Floats) -> NDArray[np.intp]:
    found: NDArray[np.intp] = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], scores)
    return found


def reliability(labels: ArrayLike, scores: ArrayLike) -> list[dict[str, float | int]]:
    """Return `probability`, `frequency` and `count` of each non-empty bin, over all findings together."""
    y, s = np.asarray(labels, dtype=np.float64).ravel(), np.asarray(scores, dtype=np.float64).ravel()
    known = (y == 0) | (y == 1)
    y, s = y[known], s[known]
    where = _bins(s)
    return [
        {"probability": float(s[where == b].mean()), "frequency": float(y[where == b].mean()), "count": int(n)}
        for b in range(BINS)
        if (n := (where == b).sum())
    ]
