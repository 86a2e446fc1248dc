"""The parts of the page on their own: ROC, ticks, curves, choice of studies, marks in reports, metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from ctx_distill.reporting import plots, svg
from ctx_distill.reporting.run_page import duration, metric_words, number
from ctx_distill.reporting.studies_section import choose_studies, shared_runs, study_fits
from ctx_distill.runs.run_reader import Metric, gather, to_metric


def test_roc_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300).astype(float)
    scores = (labels + rng.normal(0, 1, 300)).round(1)  # with ties
    labels[:20] = -1
    labels[20:30] = np.nan
    known = labels >= 0
    found = plots.roc(labels, scores)
    assert found is not None
    assert found.auroc == pytest.approx(roc_auc_score(labels[known], scores[known]), abs=1e-12)
    rates = roc_curve(labels[known], scores[known], drop_intermediate=False)
    np.testing.assert_allclose(found.false_positive_rate, rates[0])
    np.testing.assert_allclose(found.true_positive_rate, rates[1])
    assert found.positives + found.negatives == known.sum()
    assert plots.roc(np.zeros(4), np.arange(4.0)) is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0123, 0.0124), (-3, 250), (5, 5), (1e-7, 3e-7), (-1e9, 1e9)])
def test_ticks_cover_the_range(low: float, high: float) -> None:
    ticks = svg.nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9 * abs(low)
    assert ticks[-1] >= high - 1e-9 * abs(high)
    assert 2 <= len(ticks) <= 8
    words = [svg.tick_text(tick, ticks[1] - ticks[0]) for tick in ticks]
    assert len(set(words)) == len(words)


def test_learning_curves_by_epoch_and_by_step() -> None:
    log = pd.DataFrame(
        {
            "epoch": [0, 0, 0, 1, 1, 1, 2, 2],
            "step": range(8),
            "train/loss": [3, 5, None, 2, 2, None, 1, None],
            "train/pair_step": [9.0] * 8,
            "train/pair_epoch": [0.5] * 8,
            "val/loss": [None, None, 3.5, None, None, float("inf"), None, 2.0],
            "lr": 0.1,
        }
    )
    loss, pair = plots.learning_curves(log)
    assert (loss.term, loss.unit) == ("loss", "epoch")
    assert loss.train == ((0, 4), (1, 2), (2, 1))
    assert loss.val == ((0, 3.5), (2, 2.0))
    assert pair.train == ((0, 0.5), (1, 0.5), (2, 0.5))
    short = plots.learning_curves(log.iloc[:6])[0]
    assert short.unit == "step"
    long = pd.DataFrame({"epoch": 0, "step": range(5000), "train/loss": 1.0})
    assert len(plots.learning_curves(long)[0].train) <= plots.MAX_POINTS
    assert plots.learning_curves(pd.DataFrame({"epoch": [0], "lr": [1]})) == []


def test_interval_plot_draws_each_interval() -> None:
    rows = [("a", [Metric(0.7, 0.6, 0.8)]), ("b", [Metric(0.5)]), ("c", [None])]
    picture = plots.interval_plot(rows, ["Zero-shot"], 0.5)
    assert picture.count('class="whisker s0"') == 1
    assert picture.count('class="mark s0"') == 2


def test_metrics_are_read_tolerantly() -> None:
    assert to_metric({"value": 0.5, "low": 0.4, "high": 0.6}) == Metric(0.5, 0.4, 0.6)
    assert to_metric(None) == Metric(None)
    assert to_metric(1) == Metric(1.0)
    assert to_metric({"value": float("nan")}) == Metric(None)
    for other in ("0.5", True, [1], {"low": 1}):
        assert to_metric(other) is None
    assert metric_words(Metric(0.5, 0.4, 0.6)) == "0.500 [0.400, 0.600]"
    assert metric_words(None) == metric_words(Metric(None)) == number(None) == "–"
    assert [duration(s) for s in (2.54, 81, 7500, None)] == ["2.5 s", "1 min 21 s", "2 h 5 min", "–"]


def test_fits_put_good_scores_first() -> None:
    labels = pd.DataFrame({"x": [1, 1, 0, 0], "y": [0, 0, 0, np.nan]}, index=list("abcd"))
    scores = pd.DataFrame({"x": [0.9, 0.1, 0.2, 0.15], "y": [0.1, 0.9, 0.2, 0.3]}, index=list("abcd"))
    fits = study_fits(labels, scores)
    assert next(iter(fits)) == "a"
    assert list(fits)[-1] == "b"
    assert {study: sick for study, (_, sick) in fits.items()} == {"a": True, "b": True, "c": False, "d": False}


def test_chosen_studies_hold_the_best_and_the_worst(finished: Path) -> None:
    run = gather(finished)
    chosen = choose_studies(run)
    assert len(chosen) == len({study for study, _ in chosen}) == 6
    assert sum("abnormal test study" in why for _, why in chosen) == 4
    assert sum("the best" in why for _, why in chosen) == 2
    assert sum("the worst" in why for _, why in chosen) == 2
    assert chosen == choose_studies(gather(finished))


def test_shared_runs_mark_what_both_have() -> None:
    words = "The heart is enlarged. No pleural  effusion."
    found = shared_runs(words, "no pleural effusion is seen; the heart was small")
    assert found == (("The heart is enlarged. ", False), ("No pleural effusion.", True))
    assert shared_runs("", "a b c") == ()
    twice = shared_runs("a b c x a b c", "a b c")
    assert twice == (("a b c", True), (" x ", False), ("a b c", True))
