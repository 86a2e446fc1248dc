"""Cluster bootstrap: draws, intervals, undefined replicates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ctx_distill.metrics.bootstrap import Interval, bootstrap, bootstrap_mean, interval, resample_counts


def test_patients_are_drawn_whole() -> None:
    groups = ["a", "b", "a", "c", "b", "b", "d"]
    counts = resample_counts(groups, 500, seed=3)
    assert counts.shape == (500, 7)
    assert (counts[:, 0] == counts[:, 2]).all()
    assert (counts[:, 1] == counts[:, 4]).all()
    assert (counts[:, 1] == counts[:, 5]).all()
    firsts = counts[:, [0, 1, 3, 6]]
    assert (firsts.sum(1) == 4).all()  # as many patients as there are
    assert firsts.mean() == pytest.approx(1.0)
    assert firsts.std() == pytest.approx(math.sqrt(0.75), abs=0.03)  # binomial(4, 1/4)


def test_seed_decides() -> None:
    groups = list(range(20))
    assert (resample_counts(groups, 50, 1) == resample_counts(groups, 50, 1)).all()
    assert (resample_counts(groups, 50, 1) != resample_counts(groups, 50, 2)).any()


def test_interval_of_a_mean_is_the_textbook_one() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    result = bootstrap(lambda rows: float(values[rows].mean()), list(range(400)), n=2000, seed=1)
    error = values.std() / 20
    assert result.value == pytest.approx(values.mean())
    assert result.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert result.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_clusters_widen_the_interval() -> None:
    values = np.repeat(np.random.default_rng(0).normal(size=50), 8)
    clustered = bootstrap_mean(values, np.repeat(np.arange(50), 8))
    naive = bootstrap_mean(values, np.arange(400))
    assert clustered.low is not None
    assert clustered.high is not None
    assert naive.low is not None
    assert naive.high is not None
    assert (clustered.high - clustered.low) / (naive.high - naive.low) == pytest.approx(math.sqrt(8), rel=0.15)


def test_mean_equals_the_generic_bootstrap() -> None:
    values, groups = np.arange(30.0) ** 2, [f"p{i // 3}" for i in range(30)]
    generic = bootstrap(lambda rows: float(values[rows].mean()), groups, n=200, seed=4)
    quick = bootstrap_mean(values, groups, n=200, seed=4)
    assert quick.as_json() == pytest.approx(generic.as_json())


def test_undefined_values_and_replicates() -> None:
    def share(rows: np.ndarray) -> float | None:  # defined only where row 0 was drawn
        return float(rows.mean()) if 0 in rows else None

    result = bootstrap(share, list(range(6)), n=300)
    assert result.value == 2.5
    assert result.low is not None
    assert not math.isnan(result.low)
    assert bootstrap(lambda _: None, ["a", "b"]).as_json() is None
    assert bootstrap(lambda _: math.nan, ["a", "b"]).as_json() is None
    assert bootstrap(lambda _: 1.0, []).as_json() is None
    assert bootstrap_mean([], []).as_json() is None
    assert interval(1.0, [np.nan, 0.0, 1.0, 2.0], level=0.5).as_json() == {"value": 1.0, "low": 0.5, "high": 1.5}


def test_json_and_bad_arguments() -> None:
    assert Interval(0.5, 0.25, 0.75).as_json() == {"value": 0.5, "low": 0.25, "high": 0.75}
    with pytest.raises(ValueError, match="level"):
        interval(1.0, [1.0], level=95)
    with pytest.raises(ValueError, match="replicates"):
        resample_counts(["a"], 0)
