"""AUROC and average precision against scikit-learn; macro, intervals, studies."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from ctx_distill.metrics.bootstrap import bootstrap
from ctx_distill.metrics.classification import (
    auroc,
    average_precision,
    classification_report,
    macro_auroc,
)


@pytest.mark.parametrize("decimals", [1, 2, 15])
def test_agrees_with_scikit_learn(decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    for _ in range(20):
        labels = rng.integers(0, 2, 60)
        labels[:2] = 0, 1
        scores = np.round(rng.random(60) + 0.3 * labels, decimals)  # one decimal: many ties
        assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
        assert average_precision(labels, scores) == pytest.approx(average_precision_score(labels, scores), abs=1e-6)


def test_by_hand_and_left_out() -> None:
    assert auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75
    assert auroc([0, 1], [0.5, 0.5]) == 0.5
    # uncertain and blank rows are left out, whatever their score
    assert auroc([0, 0, 1, 1, -1, np.nan], [0.1, 0.4, 0.35, 0.8, 9, np.nan]) == 0.75
    for one_class in ([1, 1], [0, 0], [-1, np.nan], [0, -1]):
        assert auroc(one_class, [0.1, 0.2]) is None
        assert average_precision(one_class, [0.1, 0.2]) is None
    assert auroc([], []) is None


def test_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="NaN"):
        auroc([0, 1], [0.1, np.nan])
    with pytest.raises(ValueError, match="other than"):
        auroc([0, 2], [0.1, 0.2])
    with pytest.raises(ValueError, match="shape"):
        auroc([0, 1], [0.1])
    with pytest.raises(ValueError, match="names"):
        classification_report(np.zeros((2, 2)), np.zeros((2, 2)), ["a"], ["p", "q"])


def test_macro_leaves_out_findings_without_both_classes() -> None:
    labels = np.array([[0, 1, 1], [1, 1, 0], [0, 1, -1], [1, 1, 1]])
    scores = np.array([[0.1, 0.5, 0.9], [0.9, 0.1, 0.2], [0.95, 0.3, 0.4], [0.8, 0.2, 0.1]])
    first, third = 0.5, 0.5  # by hand: of 4 pairs 2 are in order; of 2 pairs 1
    assert macro_auroc(labels, scores) == pytest.approx((first + third) / 2)
    assert macro_auroc(np.ones((3, 2)), np.zeros((3, 2))) is None


def test_report_equals_the_slow_bootstrap() -> None:
    rng = np.random.default_rng(5)
    labels = rng.choice([0, 1, -1, np.nan], p=[0.5, 0.3, 0.1, 0.1], size=(40, 3))
    labels[:, 2] = 0
    labels[0, 2] = 1  # many replicates without a positive
    scores = np.round(rng.random((40, 3)), 1)
    patients = [f"p{i // 2}" for i in range(40)]
    report = classification_report(labels, scores, ["a", "b", "c"], patients, seed=9, n=200)
    for f, name in enumerate("abc"):
        column, label = scores[:, f], labels[:, f]
        slow = bootstrap(lambda rows, y=label, s=column: auroc(y[rows], s[rows]), patients, n=200, seed=9)
        assert report["per_finding"][name] == pytest.approx(slow.as_json(), abs=1e-6)
        slow = bootstrap(lambda rows, y=label, s=column: average_precision(y[rows], s[rows]), patients, n=200, seed=9)
        assert report["per_finding_average_precision"][name] == pytest.approx(slow.as_json(), abs=1e-6)
    macro = bootstrap(lambda rows: macro_auroc(labels[rows], scores[rows]), patients, n=200, seed=9)
    assert report["macro_auroc"] == pytest.approx(macro.as_json(), abs=1e-6)
    assert report["positives"]["c"] == 1
    assert report["negatives"]["c"] == 39
    assert (report["studies"], report["patients"], report["findings_scored"]) == (40, 20, 3)


def test_report_with_nothing_to_score_is_null_and_json() -> None:
    report = classification_report(np.full((4, 1), np.nan), np.zeros((4, 1)), ["a"], list("pqrs"))
    assert report["macro_auroc"] is None
    assert report["per_finding"] == {"a": None}
    assert json.loads(json.dumps(report))["findings_scored"] == 0
    assert classification_report(np.zeros((0, 1)), np.zeros((0, 1)), ["a"], [])["macro_auroc"] is None


def test_thousand_replicates_are_quick() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, (300, 12)), rng.random((300, 12))
    started = time.process_time()
    report = classification_report(labels, scores, [str(f) for f in range(12)], [f"p{i}" for i in range(300)])
    assert time.process_time() - started < 5
    assert report["macro_auroc"]["low"] < 0.5 < report["macro_auroc"]["high"]
