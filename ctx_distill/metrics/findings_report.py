"""All scores of predicted findings: one value with its interval per finding and measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctx_distill.metrics.bootstrap import Groups, Interval, interval, resample_counts
from ctx_distill.metrics.classification import _macro, classification_report
from ctx_distill.metrics.operating import Threshold, calibration_scores, operating_scores, reliability

MEASURES = (
    "auroc", "average_precision", "f1", "weighted_f1", "accuracy", "sensitivity", "specificity", "brier", "ece",
)  # fmt: skip


def findings_report(
    labels: ArrayLike,
    scores: ArrayLike,
    names: Sequence[str],
    patients: Groups,
    thresholds: Sequence[Threshold],
    seed: int = 0,
    n: int = 1000,
) -> dict[str, Any]:
    """Return `classification_report` with scores at thresholds and calibration, for the same draws of patients.

    Args:
        labels: (N, F), one row per study.
        scores: (N, F) probabilities.
        names: F findings.
        patients: N patient ids.
        thresholds: F, chosen on other studies.
        seed: seed of the bootstrap.
        n: number of replicates.

    Returns:
        The keys of `classification_report`, and:

        - `macro` {measure: interval or None}, the mean over the findings for which the measure is defined
        - `findings` {name: {measure: interval or None, `threshold`, `threshold_reason`}}
        - `support_weighted_f1`, scikit-learn's multi-label `average="weighted"`: F1 weighted by a finding's positives
        - `reliability`, see `operating.reliability`
        - `bootstrap`, the settings of the intervals
    """
    y, s = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    report = classification_report(y, s, names, patients, seed, n)
    counts = resample_counts(patients, n, seed)
    measured = operating_scores(y, s, [threshold.value for threshold in thresholds], counts)
    measured |= calibration_scores(y, s, counts)
    findings: dict[str, dict[str, Any]] = {}
    for f, name in enumerate(names):
        own = {"auroc": report["per_finding"][name], "average_precision": report["per_finding_average_precision"][name]}
        own |= {key: interval(values[f], draws[:, f]).as_json() for key, (values, draws) in measured.items()}
        own |= {"threshold": thresholds[f].value, "threshold_reason": thresholds[f].reason}
        findings[name] = own
    macro = {"auroc": report["macro_auroc"], "average_precision": report["macro_average_precision"]}
    macro |= {key: _macro(values, draws).as_json() for key, (values, draws) in measured.items()}
    return report | {
        "macro": macro,
        "findings": findings,
        "support_weighted_f1": _support_weighted(y, counts, *measured["f1"]).as_json(),
        "reliability": reliability(y, s),
        "bootstrap": {"unit": "patient", "replicates": n, "seed": seed, "level": 0.95},
    }


def _support_weighted(
    y: NDArray[np.float64],
    counts: NDArray[np.int32],
    values: NDArray[np.float64],
    replicates: NDArray[np.float64],
) -> Interval:
    positives = (y == 1) & ~np.isnan(values)
    if not positives.any():
        return Interval(None)
    support, draws = positives.sum(0), counts @ positives.astype(np.float64)
    value = float((support * np.nan_to_num(values)).sum() / support.sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = (draws * np.nan_to_num(replicates)).sum(1) / draws.sum(1)
    return interval(value, drawn)
