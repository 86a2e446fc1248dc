"""The tables of zero-shot: findings, retrieval, and published results."""

from __future__ import annotations

from typing import Any

from ctx_distill.metrics.bootstrap import show
from ctx_distill.metrics.findings_report import MEASURES
from ctx_distill.metrics.protocols import CT_RATE_ROWS, RETRIEVAL_ROWS, cited, comparability
from ctx_distill.metrics.report_retrieval import DIRECTIONS, RANKS

Lines = list[tuple[str, ...]]


def zero_shot_tables(metrics: dict[str, Any]) -> list[tuple[str, Lines]]:
    """Return title and lines (the header first) of each table: findings, retrieval, published results."""
    tables: list[tuple[str, Lines]] = []
    macro = metrics.get("macro")
    if macro:
        header = ("finding", "with/without", "threshold", *(name.replace("_", " ") for name in MEASURES))
        lines: Lines = [header]
        for name, own in sorted(metrics["findings"].items()):
            counts = f"{metrics['positives'][name]}/{metrics['negatives'][name]}"
            lines.append((name, counts, show(own["threshold"]), *(show(own[key]) for key in MEASURES)))
        lines.append(("macro mean", "", "", *(show(macro[key]) for key in MEASURES)))
        title = (
            f"Zero-shot findings, {metrics['split']}: {metrics['studies']} studies of {metrics['patients']} patients; "
            f"95 % intervals over patients; protocol {metrics['protocol']}"
        )
        tables.append((title, lines))
    found = metrics.get("retrieval")
    if found:
        lines = [("retrieval", *(f"recall@{k} (chance)" for k in RANKS), "median rank")]
        for direction in DIRECTIONS:
            own = found[direction]
            for prefix, words in (("", ""), ("strict_", ", own study alone")):
                recalls = [
                    show(own[f"{prefix}recall_at_{k}"])
                    + (f" ({show(own[f'recall_at_{k}_random'])})" if not prefix else "")
                    for k in RANKS
                ]
                lines.append((direction.replace("_", " ") + words, *recalls, show(own[f"{prefix}median_rank"])))
        tables.append(
            (
                f"Reports and volumes: {found['studies']} studies, {found['identical_reports']} share a report's text",
                lines,
            )
        )
    if macro:
        lines = [("zero-shot, CT-RATE", "macro AUROC", "weighted F1", "accuracy")]
        lines.append(("this run", *(show(macro[key]) for key in ("auroc", "weighted_f1", "accuracy"))))
        lines += [
            (cited(row.model, row.source), show(row.auroc), show(row.weighted_f1), show(row.accuracy))
            for row in CT_RATE_ROWS
        ]
        tables.append((f"Beside published rows. {comparability(metrics)}", lines))
    if found:
        lines = [("report to volume, CT-RATE (1,564 studies)", *(f"recall@{k}" for k in RANKS))]
        lines.append(
            ("this run, own study alone", *(show(found["report_to_volume"][f"strict_recall_at_{k}"]) for k in RANKS))
        )
        lines += [(cited(name, source), *(show(row.get(k)) for k in RANKS)) for name, source, row in RETRIEVAL_ROWS]
        tables.append((f"Beside published rows. {_retrieval_words(metrics, found)}", lines))
    return tables


def _retrieval_words(metrics: dict[str, Any], found: dict[str, Any]) -> str:
    if metrics.get("synthetic"):
        return "NOT COMPARABLE: synthetic phantoms here, CT-RATE's patients there."
    return f"Recall@k falls with the number of studies: {found['studies']} here, 1,564 there; other data sets are not comparable."


def zero_shot_notes(metrics: dict[str, Any]) -> list[str]:
    """Return the notes below the tables, one sentence each."""
    told = []
    if not metrics.get("macro"):
        told.append("No queried finding has a label column: predictions and retrieval only, no scores.")
    elif metrics["not_scored"]:
        told.append(f"No label column, so not scored: {', '.join(metrics['not_scored'])}.")
    told += [f"{name}: no threshold, {own['threshold_reason']}." for name, own in metrics.get("findings", {}).items()
             if own["threshold_reason"]]  # fmt: skip
    if metrics.get("macro"):
        told.append(f"Threshold: {metrics['threshold_rule']}.")
    if metrics.get("macro_auroc_by_reconstruction") is not None:
        told.append(f"Macro AUROC with one row per reconstruction: {show(metrics['macro_auroc_by_reconstruction'])}.")
    if metrics.get("retrieval"):
        told.append(f"Retrieval: {metrics['retrieval']['rule']}.")
    told.append("A research tool, not a medical device.")
    return told


def zero_shot_markdown(metrics: dict[str, Any]) -> str:
    """Return all tables and notes as Markdown, for `table.md`."""
    parts = ["# Zero-shot"]
    for title, lines in zero_shot_tables(metrics):
        rows = [f"| {' | '.join(line)} |" for line in lines]
        rows.insert(1, "|" + " --- |" * len(lines[0]))
        parts.append("\n".join([title, "", *rows]))
    return "\n\n".join([*parts, *zero_shot_notes(metrics)]) + "\n"
