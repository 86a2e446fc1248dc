"""The result table that a run prints at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctx_distill.metrics.bootstrap import show
from ctx_distill.runs.metric_catalogue import (
    CATALOGUE,
    REPORT_SCORES,
    RETRIEVAL_BASELINES,
    RETRIEVAL_SCORES,
)
from ctx_distill.runs.stage_table import STAGES


def look_up(metrics: dict[str, Any], path: str) -> Any:
    """Return a value of the joined metrics by its dotted path, or None."""
    value: Any = metrics
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def result_table(metrics: dict[str, Any]) -> str:
    """Return the table: stage, metric, value with its 95 % interval, chance level; undefined metrics are excluded.

    A second table compares the retrieval of stage 1 with its baselines, and a third the generated reports.
    """
    names = {stage.metrics_key: stage.table_name for stage in STAGES.values()}
    lines = [("stage", "measured", "value [95 % interval]", "by chance")]
    for path, listed in CATALOGUE.items():
        if listed.printed is None or show(look_up(metrics, path)) == "-":
            continue
        chance = look_up(metrics, listed.chance) if isinstance(listed.chance, str) else listed.chance
        level = "" if listed.chance is None else show(chance)
        lines.append((names[path.partition(".")[0]], listed.printed, show(look_up(metrics, path)), level))
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
    for key, meaning in REPORT_SCORES.items():
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
    columns = {name: title for name, title in RETRIEVAL_BASELINES.items() if f"jaccard_{name}" in retrieval}
    lines = [("retrieval, held-out CT reports", "index", *columns.values())]
    for suffix, of in (("", ""), ("_visible", ", of those an X-ray shows")):
        for meaning, own, stem in RETRIEVAL_SCORES:
            if f"{own}{suffix}" in retrieval:
                beside = (show(retrieval.get(f"{stem}_{name}{suffix}")) for name in columns)
                lines.append((f"{meaning}{of}", show(retrieval[f"{own}{suffix}"]), *beside))
    return ["", *aligned(lines)]


def aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of equal width, a rule under the first line."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [rows[0], "  ".join("-" * width for width in widths), *rows[1:]]
