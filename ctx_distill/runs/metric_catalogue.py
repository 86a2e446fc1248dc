"""The metrics of a run that its table and its pages show: names, meanings, chance levels, and which direction is better.

`ctx_distill.metrics.bootstrap.show` formats a value.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Listed:
    """A metric of the catalogue.

    Attributes:
        name: its name on a page.
        meaning: what it measures, on a page.
        chance: the chance level: a number, the key of a metric, or None.
        printed: what it measures, in the table that a run prints; None if the table omits it.
        lower_is_better: whether a lower value is better.
    """

    name: str
    meaning: str
    chance: float | str | None = None
    printed: str | None = None
    lower_is_better: bool = False


_AUROC = "share of (with, without) pairs of studies in the correct order, mean over the findings"
FINDING_MEASURES = {
    "average_precision": "Average precision",
    "f1": "F1",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "ece": "Calibration error",
}
"""Measures per finding beside AUROC, in the order of the page."""


def _at_thresholds(stage: str, printed: bool = False) -> dict[str, Listed]:
    precision, f1 = "zero-shot macro average precision, CT test", "zero-shot macro F1, CT test, thresholds of val"
    return {
        f"{stage}.macro.average_precision": Listed(
            FINDING_MEASURES["average_precision"], "mean over the findings", printed=precision if printed else None
        ),
        f"{stage}.macro.f1": Listed(
            FINDING_MEASURES["f1"],
            "mean over the findings, at thresholds chosen on val",
            printed=f1 if printed else None,
        ),
        f"{stage}.macro.ece": Listed(
            FINDING_MEASURES["ece"],
            "difference between probabilities and observed frequencies, 0 is best",
            lower_is_better=True,
        ),
    }


CATALOGUE: dict[str, Listed] = {
    "expert.macro_auroc": Listed(
        "Macro AUROC", f"zero-shot on held-out X-rays: {_AUROC}", 0.5, "zero-shot macro AUROC on held-out X-rays"
    ),
    "expert.recall_at_5": Listed(
        "Recall@5", "the correct report is among the 5 nearest to an X-ray", "expert.recall_at_5_random"
    ),
    "retrieval.jaccard_at_1": Listed(
        "Findings Jaccard@1",
        "findings that a CT and its first retrieved X-ray share, relative to those that either has",
        "retrieval.jaccard_random",
        "findings Jaccard of the nearest X-ray",
    ),
    "retrieval.jaccard_at_1_without_normals": Listed(
        "… without normal studies",
        "the same over CTs with at least one finding",
        "retrieval.jaccard_random_without_normals",
    ),
    # A run has one of the two names.
    **{
        f"retrieval.{spelling}_at_{k}": Listed(
            f"Same-set recall@{k}",
            f"{'the first retrieved X-ray' if k == 1 else f'one of the first {k}'} has exactly the CT's findings",
            f"retrieval.{spelling}_at_{k}_random",
            "same findings set among the nearest 10" if (spelling, k) == ("recall", 10) else None,
        )
        for spelling in ("same_set_recall", "recall")
        for k in (1, 5, 10)
    },
    "distillation.macro_auroc": Listed(
        "Macro AUROC",
        f"the student with the expert's text tower: {_AUROC}",
        0.5,
        "student with the expert's text tower, CT val",
    ),
    "alignment.recall_at_1": Listed(
        "Recall@1", "the correct CT is nearest to a report", "alignment.recall_at_1_random"
    ),
    "alignment.recall_at_5": Listed(
        "Recall@5",
        "the correct CT is among the 5 nearest to a report",
        "alignment.recall_at_5_random",
        "report to volume recall@5, CT val",
    ),
    "alignment.recall_at_10": Listed(
        "Recall@10", "the correct CT is among the 10 nearest to a report", "alignment.recall_at_10_random"
    ),
    "zero_shot.macro_auroc": Listed(
        "Macro AUROC", f"with prompts only, no labels used: {_AUROC}", 0.5, "zero-shot macro AUROC, CT test"
    ),
    **_at_thresholds("zero_shot", printed=True),
    "zero_shot.retrieval.report_to_volume.recall_at_5": Listed(
        "Report to volume, recall@5",
        "the correct CT is among the 5 nearest to a report, test",
        "zero_shot.retrieval.report_to_volume.recall_at_5_random",
        "report to volume recall@5, CT test",
    ),
    "zero_shot.retrieval.volume_to_report.recall_at_5": Listed(
        "Volume to report, recall@5",
        "the correct report is among the 5 nearest to a CT, test",
        "zero_shot.retrieval.volume_to_report.recall_at_5_random",
    ),
    "classifier.macro_auroc": Listed(
        "Macro AUROC", f"with a head trained on labels: {_AUROC}", 0.5, "supervised macro AUROC, CT test"
    ),
    **_at_thresholds("classifier"),
    "report.findings_f1": Listed(
        "Findings F1",
        "findings of the generated report compared with those of the reference",
        printed="findings F1 of generated reports, CT test",
    ),
    "report.bleu4": Listed(
        "BLEU-4",
        "word sequences of up to 4 shared with the reference report",
        printed="BLEU-4 of generated reports, CT test",
    ),
    "report.rouge_l": Listed("ROUGE-L", "longest common word sequence with the reference report"),
}
"""Dotted key in `metrics.json` -> metric, in the order of the stages."""

REPORT_SCORES = {
    "findings_f1": "Findings F1",
    "findings_macro_f1": "Findings F1, mean over findings",
    "bleu1": "BLEU-1",
    "bleu4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "meteor": "METEOR",
}
"""Scores of generated reports that are compared with the baselines."""
BASELINE_NAMES = {"nearest": "Nearest training report", "frequent": "Most frequent training report"}

RETRIEVAL_SCORES = (
    ("findings Jaccard of the nearest X-ray", "jaccard_at_1", "jaccard"),
    ("same findings set at the first place", "recall_at_1", "recall_at_1"),
    ("same findings set among the nearest 5", "recall_at_5", "recall_at_5"),
    ("same findings set among the nearest 10", "recall_at_10", "recall_at_10"),
)
"""What it measures, key of the index's value, and the start of its baselines' keys."""
RETRIEVAL_BASELINES = {"random": "random", "tfidf": "TF-IDF", "rerank": "re-ranked", "oracle": "oracle"}
