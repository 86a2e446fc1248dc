"""Baselines by hand, and the verdict both ways."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest

from ctx_distill.metrics import report_extras
from ctx_distill.metrics.generation import generation_report
from ctx_distill.metrics.report_baselines import beside_baselines, most_frequent_report, nearest_reports
from ctx_distill.metrics.report_extras import EXTRAS, extra_scores
from ctx_distill.text.extractor import Finding, Vocabulary

VOCABULARY = Vocabulary("test", tuple(Finding(name, (name,)) for name in ("effusion", "nodule", "mass")))
TRUE = [
    "There is an effusion on the left side.",
    "A nodule lies in the upper right lobe.",
    "A mass lies in the left hilum of the lung.",
    "Both an effusion and a nodule are seen today.",
] * 5
CLEAR = "The lungs are clear and the heart is normal."
PATIENTS = [f"p{place}" for place in range(len(TRUE))]


def test_the_nearest_report_is_that_of_the_largest_cosine() -> None:
    keys = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    queries = np.array([[0.8, 0.6], [0.1, 0.995], [0.99, -0.14]])  # cosines .8 .96 .6; .1 .856 .995; .99 .48 -.14
    assert nearest_reports(queries, keys, ["a", "b", "c"]) == ["b", "c", "a"]
    assert nearest_reports(np.array([[0.0, 1.0]]), np.array([[0.0, 1.0], [0.0, 1.0]]), ["first", "second"]) == ["first"]


def test_the_most_frequent_report() -> None:
    assert most_frequent_report(["A mass.", "Clear lungs.", "clear  LUNGS.", "A nodule."]) == "Clear lungs."
    # None comes twice: sentences stand in 3, 1 / 3, 2 / 3, 2 of the reports
    free = ["Clear. A mass.", "Clear. No air.", "No air. Clear. "]
    assert most_frequent_report(free) == "Clear. No air."


def test_a_decoder_that_is_right_beats_baselines_that_are_not() -> None:
    found = beside_baselines(
        TRUE, TRUE, {"nearest": [CLEAR] * 20, "frequent": TRUE[1:] + TRUE[:1]}, PATIENTS, VOCABULARY
    )
    assert found["verdict"].startswith(
        "The decoder beats its baselines. Beside the nearest training report it is better in"
    )
    assert "not better" not in found["verdict"]
    assert found["baselines"]["nearest"] == generation_report(TRUE, [CLEAR] * 20, PATIENTS, VOCABULARY)[0]
    assert found["against"]["nearest"]["findings_f1"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_a_decoder_that_is_not_better_says_so() -> None:
    found = beside_baselines(TRUE, [CLEAR] * 20, {"nearest": TRUE, "frequent": [CLEAR] * 20}, PATIENTS, VOCABULARY)
    assert found["verdict"].startswith("The decoder does not beat its baselines.")
    assert (
        "Beside the nearest training report it is not better in findings F1 (-1.000 [-1.000, -1.000])"
        in found["verdict"]
    )
    assert "Beside the most frequent training report it is not better in findings F1 (+0.000" in found["verdict"]
    # better in words than one, not in findings: not beaten either
    half = beside_baselines(TRUE, TRUE, {"nearest": TRUE[:1] * 20, "frequent": TRUE}, PATIENTS, VOCABULARY)
    assert half["verdict"].startswith("The decoder does not beat its baselines.")
    assert "better in findings F1 (+" in half["verdict"]


def test_differences_are_paired() -> None:
    """The replicates of both draw the same patients: of a system against itself nothing is left."""
    said = TRUE[:10] + [CLEAR] * 10
    found = beside_baselines(TRUE, said, {"nearest": said}, PATIENTS, VOCABULARY)
    assert 0 < found["bleu4"]["value"] < 1
    assert found["bleu4"]["low"] < found["bleu4"]["high"]
    assert found["against"]["nearest"]["bleu4"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_extras_are_null_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = extra_scores(TRUE, TRUE)
    assert [quiet[name] for name in EXTRAS] == [None] * 4
    assert set(quiet["absent"]) == set(EXTRAS)
    monkeypatch.setattr(report_extras.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "radeval", None)
    asked = extra_scores(TRUE, TRUE, EXTRAS)
    assert [asked[name] for name in EXTRAS] == [None] * 4
    assert "no `java` on PATH" in asked["absent"]["meteor"]
    assert "RadEval 2.2 or newer cannot be imported" in asked["absent"]["green"]
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor.meteor", None)
    assert "pycocoevalcap is not installed" in extra_scores(TRUE, TRUE, ["meteor"])["absent"]["meteor"]


def test_radeval_is_asked_for_one_score_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the signature, the names and the keys that RadEval 2.2.1 was seen to have."""

    class RadEval:
        def __init__(
            self, metrics: list[str], per_sample: bool = False, detailed: bool = False, show_progress: bool = True
        ) -> None:
            (self.name,) = metrics
            if self.name not in ("bleu", "rouge", "f1chexbert", "radgraph", "green"):
                raise ValueError(f"Unknown metric '{self.name}'")
            if self.name == "green":
                raise OSError("weights\nnot reachable")

        def __call__(self, refs: list[str], hyps: list[str]) -> dict[str, float]:
            assert (refs, hyps) == (TRUE, TRUE[::-1])
            return {"radgraph": {"radgraph_simple": 0.5, "radgraph_partial": np.float64(0.25)},
                    "f1chexbert": {"f1chexbert_5_micro_f1": 1}}[self.name]  # fmt: skip

    monkeypatch.setitem(sys.modules, "radeval", types.SimpleNamespace(RadEval=RadEval))
    found = extra_scores(TRUE, TRUE[::-1], ["radgraph", "chexbert", "green"])
    assert found["radgraph"] == {"radgraph_simple": 0.5, "radgraph_partial": 0.25}
    assert found["chexbert"] == {"f1chexbert_5_micro_f1": 1.0}
    assert found["green"] is None
    assert found["absent"].keys() == {"green", "meteor"}
    assert found["absent"]["green"] == "weights not reachable"
    json.dumps(found)


def test_the_real_radeval_has_what_is_asked_of_it() -> None:
    """Where the extra `radeval` is installed: its call and its names; its weights are not fetched."""
    registry = pytest.importorskip("radeval.metrics._registry", reason="the extra `radeval` is not installed")
    assert set(report_extras.RADEVAL.values()) <= set(registry.METRIC_REGISTRY)
    from radeval import RadEval

    found = RadEval(metrics=["rouge"], show_progress=False)(refs=["a small nodule"], hyps=["a small nodule"])
    assert found["rougeL"] == 1.0
