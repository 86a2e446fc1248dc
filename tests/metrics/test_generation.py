"""BLEU against sacrebleu and torchmetrics, ROUGE-L by hand, findings against scikit-learn."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from sklearn.metrics import f1_score, precision_score, recall_score
from torchmetrics.text import SacreBLEUScore

from ctx_distill.metrics.bootstrap import bootstrap
from ctx_distill.metrics.generation import bleu, findings_scores, generation_report, rouge_l
from ctx_distill.text.extractor import Finding, Vocabulary

VOCABULARY = Vocabulary("test", tuple(Finding(name, (name,)) for name in ("effusion", "nodule", "mass", "hernia")))
REFERENCES = [
    "Small left pleural effusion. No nodule or mass is seen.",
    "The heart is normal. There is a nodule in the right upper lobe.",
    "No effusion. No nodule. A mass in the left lower lobe of the lung is seen.",
    "The lungs are clear. No effusion is seen, no nodule is seen.",
]
HYPOTHESES = [
    "Small right pleural effusion. No mass is seen.",
    "The heart is normal. There is a mass in the right upper lobe.",
    "",
    "The lungs are clear. A nodule in the left lower lobe of the lung is seen.",
]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bleu_is_that_of_sacrebleu(order: int) -> None:
    reference = BLEU(lowercase=True, smooth_method="none", max_ngram_order=order)
    expected = reference.corpus_score(HYPOTHESES, [REFERENCES]).score / 100
    assert 0.1 < expected < 1
    assert bleu(REFERENCES, HYPOTHESES)[f"bleu{order}"] == pytest.approx(expected, abs=1e-9)
    scorer = SacreBLEUScore(n_gram=order, tokenize="13a", lowercase=True)
    assert float(scorer(HYPOTHESES, [[text] for text in REFERENCES])) == pytest.approx(expected, abs=1e-6)


def test_bleu_of_lines_that_end_in_a_hyphen_is_that_of_sacrebleu() -> None:
    references, hypotheses = (
        ["A left-\nsided mass. -\n", "No mass &amp; no nodule."],
        ["A left-sided mass -\n", "no mass"],
    )
    expected = BLEU(lowercase=True, smooth_method="none", max_ngram_order=2).corpus_score(hypotheses, [references])
    assert bleu(references, hypotheses)["bleu2"] == pytest.approx(expected.score / 100, abs=1e-9)


def test_bleu_by_hand_and_edges() -> None:
    # 3 of 4 words, 2 of 3 pairs; the reference is longer by 1: exp(1 - 5 / 4)
    scores = bleu(["the left lung is clear"], ["The left lung clear"])
    assert scores["bleu1"] == pytest.approx(math.exp(-0.25))
    assert scores["bleu2"] == pytest.approx(math.exp(-0.25) * math.sqrt(2 / 3))
    assert scores["bleu4"] == 0.0
    assert bleu(["a b c d e"], ["a b c d e"]) == pytest.approx({f"bleu{n}": 1.0 for n in range(1, 5)})
    assert bleu(["a b"], [""]) == {f"bleu{n}": 0.0 for n in range(1, 5)}
    assert bleu([], []) == dict.fromkeys(["bleu1", "bleu2", "bleu3", "bleu4"])
    with pytest.raises(ValueError, match="1 references and 2"):
        bleu(["a"], ["a", "b"])


def test_rouge_l_by_hand() -> None:
    # longest common subsequence: the lung clear = 3 of 5 and of 4 words
    precision, recall = 3 / 4, 3 / 5
    expected = 2 * precision * recall / (precision + recall)
    assert rouge_l(["the left lung is clear"], ["The lung seems clear"]) == pytest.approx(expected)
    assert rouge_l(["a lung", "a lung"], ["a lung", ""]) == pytest.approx(0.5)
    assert rouge_l([], []) is None


def test_findings_scores_agree_with_scikit_learn() -> None:
    true = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    said = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]])
    scores = findings_scores(REFERENCES, HYPOTHESES, VOCABULARY)
    assert scores["precision"] == pytest.approx(precision_score(true, said, average="micro"))
    assert scores["recall"] == pytest.approx(recall_score(true, said, average="micro"))
    assert scores["f1"] == pytest.approx(f1_score(true, said, average="micro"))
    # over the three findings that a reference asserts; nobody speaks of a hernia
    assert scores["macro_f1"] == pytest.approx(f1_score(true[:, :3], said[:, :3], average="macro", zero_division=0))
    for name, of in (("macro_precision", precision_score), ("macro_recall", recall_score)):
        assert scores[name] == pytest.approx(of(true[:, :3], said[:, :3], average="macro", zero_division=0))
    assert findings_scores(["No mass."], ["Mass."], VOCABULARY) == {
        "precision": 0.0,
        "recall": None,
        "f1": 0.0,
        "macro_precision": None,
        "macro_recall": None,
        "macro_f1": None,
    }


def test_report_has_all_keys_and_the_slow_bootstraps_intervals() -> None:
    patients = ["p", "p", "q", "r"]
    report = generation_report(REFERENCES, HYPOTHESES, patients, VOCABULARY, seed=2, n=200)[0]

    def slow(key: str) -> dict[str, float] | None:
        def statistic(rows: np.ndarray) -> float | None:
            references, hypotheses = [REFERENCES[i] for i in rows], [HYPOTHESES[i] for i in rows]
            if key == "bleu4":
                return bleu(references, hypotheses)["bleu4"]
            return findings_scores(references, hypotheses, VOCABULARY)["f1"]

        return bootstrap(statistic, patients, n=200, seed=2).as_json()

    assert report["bleu4"] == pytest.approx(slow("bleu4"))
    assert report["findings_f1"] == pytest.approx(slow("findings_f1"))
    assert report["bleu1"] == bleu(REFERENCES, HYPOTHESES)["bleu1"]
    assert report["findings_recall"] == pytest.approx(1 / 3)
    assert (report["reports"], report["empty"]) == (4, 1)
    json.dumps(report)


def test_empty_corpus_is_null() -> None:
    report = generation_report([], [], [], VOCABULARY)[0]
    assert {key for key, value in report.items() if value is not None} == {"reports", "empty"}
    assert {"bleu1", "bleu2", "bleu3", "bleu4", "rouge_l"} < set(report)
    silent = generation_report(["A mass."], [""], ["p"], VOCABULARY, n=10)[0]
    assert silent["bleu4"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert silent["findings_f1"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert silent["findings_precision"] is None
