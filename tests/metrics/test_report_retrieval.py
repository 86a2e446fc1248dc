"""Recall and median rank of both directions by hand, with studies that share a report."""

from __future__ import annotations

import numpy as np
import pytest

from ctx_distill.metrics.report_retrieval import report_retrieval


def test_by_hand_with_a_report_that_two_studies_share() -> None:
    # cosines are what is written here: text features are the unit vectors
    image = np.array([[0.9, 0.9, 0.1, 0.2], [0.8, 0.8, 0.7, 0.1], [0.2, 0.2, 0.3, 0.9], [0.1, 0.1, 0.6, 0.4]])
    text = np.eye(4)
    reports = ["Normal chest.", "normal  CHEST.", "A nodule.", "An effusion."]
    metrics, ranks = report_retrieval(image, text, reports, list("pqrs"), n=50)
    # texts ask down the columns: column 0 is .9 .8 .2 .1, so study 1's volume is second and, for its shared text, right
    assert ranks["report_to_volume"]["rank"].tolist() == [1, 1, 3, 2]
    assert ranks["report_to_volume"]["strict_rank"].tolist() == [1, 2, 3, 2]
    # volumes ask along the rows: the shared report ties with itself, which only the strict rank counts against it
    assert ranks["volume_to_report"]["rank"].tolist() == [1, 1, 2, 2]
    assert ranks["volume_to_report"]["strict_rank"].tolist() == [2, 2, 2, 2]
    assert ranks["report_to_volume"]["nearest"].tolist() == [0, 0, 1, 2]
    forth = metrics["report_to_volume"]
    assert forth["recall_at_1"]["value"] == 0.5
    assert forth["strict_recall_at_1"]["value"] == 0.25
    assert forth["median_rank"]["value"] == 1.5
    assert forth["strict_median_rank"]["value"] == 2.0
    assert forth["recall_at_1_random"] == pytest.approx((2 / 4 + 2 / 4 + 1 / 4 + 1 / 4) / 4)
    assert forth["recall_at_5"] is None  # of four studies the first five are all
    assert metrics["identical_reports"] == 2
    assert metrics["volume_to_report"]["strict_recall_at_1"]["value"] == 0.0


def test_recalls_are_counts_of_a_sorted_list() -> None:
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(120, 8)), rng.normal(size=(120, 8))
    metrics, _ = report_retrieval(image, text, [f"report {i}" for i in range(120)], np.arange(120) // 2, n=20)
    order = np.argsort(-(text @ image.T), axis=1)
    place = np.array([list(row).index(i) + 1 for i, row in enumerate(order)])
    for k in (1, 5, 10, 50, 100):
        assert metrics["report_to_volume"][f"recall_at_{k}"]["value"] == pytest.approx((place <= k).mean())
        assert metrics["report_to_volume"][f"recall_at_{k}_random"] == pytest.approx(k / 120)
    assert metrics["report_to_volume"]["median_rank"]["value"] == np.median(place)
