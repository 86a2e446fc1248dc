"""Thresholds, scores at them and calibration against scikit-learn; intervals against the slow bootstrap."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    f1_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from ctx_distill.metrics.bootstrap import bootstrap
from ctx_distill.metrics.findings_report import MEASURES, findings_report
from ctx_distill.metrics.operating import Threshold, choose_thresholds, reliability


def cohort(seed: int, rows: int = 120, decimals: int = 2) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = rng.choice([0.0, 1.0, -1.0, np.nan], p=[0.55, 0.3, 0.1, 0.05], size=(rows, 4))
    scores = np.round(np.clip(0.6 * rng.random((rows, 4)) + 0.3 * (labels == 1), 0, 1), decimals)  # ties
    return labels, scores


def by_scikit_learn(y: Any, s: Any, threshold: float) -> dict[str, float]:
    y, s = y[(y == 0) | (y == 1)], s[(y == 0) | (y == 1)]
    called = (s >= threshold).astype(int)
    frequency, probability = calibration_curve(y, s, n_bins=10, strategy="uniform")
    sizes = np.histogram(np.searchsorted(np.linspace(0, 1, 11)[1:-1], s), bins=np.arange(11))[0]
    return {
        "auroc": roc_auc_score(y, s),
        "average_precision": average_precision_score(y, s),
        "f1": f1_score(y, called),
        "weighted_f1": f1_score(y, called, average="weighted"),
        "accuracy": accuracy_score(y, called),
        "sensitivity": recall_score(y, called),
        "specificity": recall_score(y, called, pos_label=0),
        "brier": brier_score_loss(y, s),
        "ece": float((sizes[sizes > 0] / len(y) * np.abs(frequency - probability)).sum()),
    }


@pytest.mark.parametrize("decimals", [1, 2, 15])
def test_every_measure_and_its_macro_mean_are_scikit_learn_s(decimals: int) -> None:
    names = list("abcd")
    thresholds = choose_thresholds(*cohort(1, decimals=decimals))
    labels, scores = cohort(2, decimals=decimals)
    report = findings_report(labels, scores, names, np.arange(len(labels)) // 2, thresholds, n=50)
    expected = [by_scikit_learn(labels[:, f], scores[:, f], float(thresholds[f].value or 0)) for f in range(4)]
    assert set(MEASURES) == set(expected[0])
    for measure in MEASURES:
        for f, name in enumerate(names):
            assert report["findings"][name][measure]["value"] == pytest.approx(expected[f][measure], abs=1e-6)
        mean = np.mean([own[measure] for own in expected])
        assert report["macro"][measure]["value"] == pytest.approx(mean, abs=1e-6), measure
        assert report["macro"][measure]["low"] < mean < report["macro"][measure]["high"]
    json.dumps(report, allow_nan=False)


def test_f1_weighted_by_support_is_scikit_learn_s_multi_label_one() -> None:
    labels, scores = cohort(3)
    labels = (labels == 1).astype(float)
    thresholds = choose_thresholds(*cohort(4))
    called = scores >= np.array([threshold.value for threshold in thresholds])
    report = findings_report(labels, scores, list("abcd"), np.arange(120), thresholds, n=20)
    wanted = f1_score(labels, called, average="weighted")
    assert report["support_weighted_f1"]["value"] == pytest.approx(wanted, abs=1e-6)


def test_the_threshold_is_the_nearest_point_of_scikit_learn_s_roc_curve() -> None:
    for seed in range(10):
        labels, scores = cohort(seed, 60)
        for f, found in enumerate(choose_thresholds(labels, scores)):
            known = (labels[:, f] == 0) | (labels[:, f] == 1)
            fpr, tpr, at = roc_curve(labels[known, f], scores[known, f], drop_intermediate=False)
            distance = np.round(np.hypot(fpr, 1 - tpr), 12)
            assert found.value == at[distance == distance.min()].max()


def test_thresholds_by_hand_and_of_one_class() -> None:
    assert choose_thresholds([[0], [0], [1], [1]], [[0.1], [0.4], [0.35], [0.8]])[0].value == 0.8
    assert choose_thresholds([[0], [1]], [[0.2], [0.7]])[0] == Threshold(0.7)
    none = choose_thresholds([[1], [1], [-1]], [[0.2], [0.7], [0.1]])[0]
    assert none.value is None
    assert none.reason is not None
    assert "2 studies with and 0 without" in none.reason


def test_what_is_not_defined_is_null_and_left_out_of_the_mean() -> None:
    labels = np.array([[0, 1, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    scores = np.array([[0.1, 0.9, 0.2], [0.6, 0.4, 0.3], [0.2, 0.2, 0.9], [0.3, 0.3, 0.8]])
    report = findings_report(
        labels, scores, list("abc"), list("pqrs"), [Threshold(0.5), Threshold(0.5), Threshold(None, "why")], n=200
    )
    a, b, c = (report["findings"][name] for name in "abc")
    assert a["f1"] is None
    assert a["sensitivity"] is None
    assert a["specificity"]["value"] == 0.75
    assert c["accuracy"] is None
    assert (c["threshold"], c["threshold_reason"]) == (None, "why")
    assert c["brier"] is not None
    assert report["macro"]["sensitivity"]["value"] == b["sensitivity"]["value"] == 0.5
    assert report["macro"]["f1"]["value"] == b["f1"]["value"] == pytest.approx(2 / 3)


def test_intervals_are_those_of_the_slow_bootstrap_over_patients() -> None:
    labels, scores = cohort(5, 40)
    patients = [f"p{i // 2}" for i in range(40)]
    thresholds = choose_thresholds(*cohort(6))
    report = findings_report(labels, scores, list("abcd"), patients, thresholds, seed=3, n=100)
    y, s, at = labels[:, 0], scores[:, 0], float(thresholds[0].value or 0)
    for measure in MEASURES:

        def slow(rows: Any, measure: str = measure) -> float | None:
            if len(set(y[rows][(y[rows] == 0) | (y[rows] == 1)])) < 2:
                return None
            return by_scikit_learn(y[rows], s[rows], at)[measure]

        wanted = bootstrap(slow, patients, n=100, seed=3).as_json()
        assert report["findings"]["a"][measure] == pytest.approx(wanted, abs=1e-6), measure


def test_the_reliability_curve_is_scikit_learn_s() -> None:
    labels, scores = cohort(7)
    known = (labels == 0) | (labels == 1)
    frequency, probability = calibration_curve(labels[known], scores[known], n_bins=10)
    curve = reliability(labels, scores)
    np.testing.assert_allclose([bin_["frequency"] for bin_ in curve], frequency, atol=1e-9)
    np.testing.assert_allclose([bin_["probability"] for bin_ in curve], probability, atol=1e-9)
    assert sum(bin_["count"] for bin_ in curve) == known.sum()
