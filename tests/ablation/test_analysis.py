"""Intervals over patients and seeds, paired differences and Holm's correction, against hand-computed cases."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ctx_distill.ablation.analysis import crossed, difference, holm
from ctx_distill.metrics.bootstrap import resample_counts
from ctx_distill.metrics.classification import macro_auroc_replicates


def test_replicates_are_scikit_learn_s_auroc_of_the_drawn_patients() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, (60, 3)).astype(float), rng.random((60, 3))
    patients = [f"p{i // 2}" for i in range(60)]
    counts = resample_counts(patients, 5, seed=3)
    values, replicates = macro_auroc_replicates(labels, scores, counts)
    np.testing.assert_allclose(values, [roc_auc_score(labels[:, f], scores[:, f]) for f in range(3)])
    for count, replicate in zip(counts, replicates, strict=True):
        rows = np.repeat(np.arange(60), count)
        expected = np.mean([roc_auc_score(labels[rows, f], scores[rows, f]) for f in range(3)])
        assert replicate == pytest.approx(expected)


def test_one_seed_leaves_the_patients_own_interval() -> None:
    replicates = np.linspace(0.6, 0.8, 1001)
    found = crossed({0: 0.7}, {0: replicates}, draws=200_000)
    assert found.value == 0.7
    assert found.low == pytest.approx(0.605, abs=0.001)
    assert found.high == pytest.approx(0.795, abs=0.001)


def test_without_patients_part_the_spread_is_that_of_the_seeds_means() -> None:
    # two seeds at .6 and .8: means of two draws are .6, .7, .8 with shares 1/4, 1/2, 1/4
    found = crossed({0: 0.6, 1: 0.8}, {0: np.full(10, 0.6), 1: np.full(10, 0.8)})
    assert (found.low, found.high) == (pytest.approx(0.6), pytest.approx(0.8))
    assert found.value == pytest.approx(0.7)


def test_the_same_patients_are_drawn_for_both_arms() -> None:
    rng = np.random.default_rng(1)
    patients = rng.normal(0, 0.05, 500)  # what all runs share
    first = dict.fromkeys(range(3), 0.75 + patients)
    second = dict.fromkeys(range(3), 0.7 + patients)
    found = difference((dict.fromkeys(range(3), 0.75), dict.fromkeys(range(3), 0.70)), (first, second))
    assert found.value == pytest.approx(0.05)
    assert found.low == pytest.approx(0.05)
    assert found.p == pytest.approx(2 / 10_001)


def test_an_arm_without_training_is_set_against_every_seed() -> None:
    first = {0: 0.8, 1: 0.9}
    found = difference((first, {5: 0.7}), ({k: np.full(9, v) for k, v in first.items()}, {5: np.full(9, 0.7)}))
    assert found.value == pytest.approx(0.15)
    assert found.seeds == 2


def test_no_difference_has_a_large_p() -> None:
    noise = np.random.default_rng(2).normal(0, 0.02, 500)
    found = crossed({0: 0.0}, {0: noise})
    assert found.p > 0.5
    assert found.low < 0 < found.high


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8})["b"] == 1.0


def test_seeds_without_resamplings_are_refused() -> None:
    with pytest.raises(ValueError, match="seeds"):
        crossed({0: 0.5}, {1: np.zeros(3)})
