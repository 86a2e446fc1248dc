"""The result table that a run prints at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctx_distill.metrics.zero_shot_table import show

ROWS = (
    ("X-ray expert", "expert.macro_auroc", "zero-shot macro AUROC on held-out X-rays", ".500"),
    ("1 retrieval", "retrieval.jaccard_at_1", "findings Jaccard of the nearest X-ray", "retrieval.jaccard_random"),
    (
        "1 retrieval",
        "retrieval.recall_at_10",
        "same findings set among the nearest 10",
        "retrieval.recall_at_10_random",
    ),
    ("2 distillation", "distillation.macro_auroc", "student asked by the expert's text tower, CT val", ".500"),
    ("3 alignment", "alignment.recall_at_5", "report to volume recall@5, CT val", "alignment.recall_at_5_random"),
    ("4 zero-shot", "zero_shot.macro_auroc", "zero-shot macro AUROC, CT test", ".500"),
    ("4 zero-shot", "zero_shot.macro.average_precision", "zero-shot macro average precision, CT test", ""),
    ("4 zero-shot", "zero_shot.macro.f1", "zero-shot macro F1, CT test, thresholds of val", ""),
    (
        "4 zero-shot",
        "zero_shot.retrieval.report_to_volume.recall_at_5",
        "report to volume recall@5, CT test",
        "zero_shot.retrieval.report_to_volume.recall_at_5_random",
    ),
    ("4 classifier", "classifier.macro_auroc", "supervised macro AUROC, CT test", ".500"),
    ("4 report", "report.findings_f1", "findings F1 of generated reports, CT test", ""),
    ("4 report", "report.bleu4", "BLEU-4 of generated reports, CT test", ""),
)

REPORT_ROWS = (
    ("findings F1", "findings_f1"),
    ("findings F1, mean over findings", "findings_macro_f1"),
    ("BLEU-4", "bleu4"),
    ("ROUGE-L", "rouge_l"),
    ("CIDEr", "cider"),
)

RETRIEVAL_ROWS = (
    ("findings Jaccard of the nearest X-ray", "jaccard_at_1", "jaccard"),
    ("same findings set at the first place", "recall_at_1", "recall_at_1"),
    ("same findings set among the nearest 5", "recall_at_5", "recall_at_5"),
    ("same findings set among the nearest 10", "recall_at_10", "recall_at_10"),
)
RETRIEVAL_COLUMNS = {"random": "random", "tfidf": "TF-IDF", "rerank": "re-ranked", "oracle": "oracle"}


def look_up(metrics: dict[str, Any], path: str) -> Any:
    """A value of the joined metrics by its dotted path; None where there is none."""
    value: Any = metrics
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def result_table(metrics: dict[str, Any]) -> str:
    """The table: stage, what was measured, value with its 95 % interval, chance level; what is not defined is left out.

    Where stage 1 measured its retrieval, a second table sets it beside the baselines; so does one for generated reports.
    """
    lines = [("stage", "measured", "value [95 % interval]", "by chance")]
    for stage, path, meaning, chance in ROWS:
        if show(look_up(metrics, path)) == "-":
            continue
        level = show(look_up(metrics, chance)) if "_" in chance else chance.replace(".500", "0.500")
        lines.append((stage, meaning, show(look_up(metrics, path)), level))
    return "\n".join(
        [
            "",
            *aligned(lines),
            *retrieval_table(metrics.get("retrieval") or {}),
            *report_table(metrics.get("report") or {}),
        ]
    )


def report_table(report: dict[str, Any]) -> list[str]:
    """Lines of the generated reports beside the nearest and the most frequent training report, and the verdict.

    Args:
        report: the metrics of the report decoder; without baselines among them there is no table.
    """
    baselines = report.get("baselines") or {}
    if not baselines:
        return []
    lines = [("generated reports, CT test", "decoder", *(f"{name} report" for name in baselines))]
    for meaning, key in REPORT_ROWS:
        if show(report.get(key)) != "-":
            lines.append((meaning, show(report[key]), *(show(scores.get(key)) for scores in baselines.values())))
    return ["", *aligned(lines), str(report.get("verdict") or "")]


def retrieval_table(retrieval: dict[str, Any]) -> list[str]:
    """Lines of the retrieval's table: the index beside random X-rays, TF-IDF, its findings re-rank and the oracle.

    Args:
        retrieval: the metrics of stage 1; without an oracle's figure among them there is no table.
    """
    if show(retrieval.get("jaccard_oracle")) == "-":
        return []
    columns = {name: title for name, title in RETRIEVAL_COLUMNS.items() if f"jaccard_{name}" in retrieval}
    lines = [("retrieval, held-out CT reports", "index", *columns.values())]
    for suffix, of in (("", ""), ("_visible", ", of those an X-ray shows")):
        for meaning, own, stem in RETRIEVAL_ROWS:
            if f"{own}{suffix}" in retrieval:
                beside = (show(retrieval.get(f"{stem}_{name}{suffix}")) for name in columns)
                lines.append((f"{meaning}{of}", show(retrieval[f"{own}{suffix}"]), *beside))
    return ["", *aligned(lines)]


def aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of equal width, a rule under the first line."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [rows[0], "  ".join("-" * width for width in widths), *rows[1:]]
