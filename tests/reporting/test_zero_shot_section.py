"""The page's part on zero-shot: what of `metrics.json` it shows, and that odd values do not break it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctx_distill.metrics.findings_report import findings_report
from ctx_distill.metrics.operating import Threshold
from ctx_distill.metrics.report_retrieval import report_retrieval
from ctx_distill.reporting import build_page


def with_metrics(run: Path, more: dict[str, Any]) -> str:
    path = run / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["zero_shot"] |= more
    path.write_text(json.dumps(metrics))
    html = build_page(run).read_text(encoding="utf-8")
    return " ".join(re.sub(r"<[^>]+>", " ", html.partition("</style>")[2]).split()) + "\n" + html


def test_scores_at_thresholds_reliability_and_retrieval(make_run: Callable[..., Path]) -> None:
    report = findings_report(
        [[0, 0], [0, 1], [1, 0], [1, 1]], [[0.1, 0.2], [0.7, 0.4], [0.8, 0.9], [0.9, 0.3]], ["nodule", "<i>mass"],
        list("pqrs"), [Threshold(0.6), Threshold(None, "val has none")], n=20,
    )  # fmt: skip
    unit = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [0.6, 0.8]]
    retrieval, _ = report_retrieval(unit, unit, list("abcde"), list("pqrst"), n=20)
    page = with_metrics(make_run(), {"findings": report["findings"], "macro": report["macro"], "retrieval": retrieval,
                                     "reliability": report["reliability"], "threshold_rule": "the rule"})  # fmt: skip
    assert "Threshold: the rule." in page
    assert re.search(r"nodule 0\.600", page)
    assert "0.500" in page  # the specificity of the nodule: one of two
    assert "&lt;i&gt;mass" in page
    assert "val has none" in page
    assert "Reliability curve: predicted" in page
    assert "Report to volume" in page
    assert "by chance 0.200" in page


@pytest.mark.parametrize(
    "more",
    [
        {"findings": 3, "macro": None, "retrieval": [1], "reliability": "x"},
        {"findings": {"a": None}, "macro": {"f1": None}, "retrieval": {"report_to_volume": {}}, "reliability": [1, {}]},
        {"findings": {"a": {"f1": "x", "threshold": "y"}}, "retrieval": {"volume_to_report": {"recall_at_1": None}}},
    ],
)
def test_odd_values_do_not_break_it(make_run: Callable[..., Path], more: dict[str, Any]) -> None:
    assert "Results" in with_metrics(make_run(), more)
