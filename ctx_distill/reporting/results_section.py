"""The section on results: headline tiles, the results table with explanations, and all metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ctx_distill.runs.metric_catalogue import BASELINE_NAMES, CATALOGUE, REPORT_SCORES
from ctx_distill.runs.run_reader import PAGE_STAGES, Metric, Run, to_metric


@dataclass(frozen=True)
class MetricRow:
    """A row of the results table; `chance` is None without a chance level."""

    stage: str
    name: str
    metric: Metric
    meaning: str
    chance: Metric | None


@dataclass(frozen=True)
class Tile:
    """A headline metric, or None with the reason in `note`."""

    title: str
    metric: Metric | None
    note: str


def result_rows(run: Run) -> list[MetricRow]:
    """Return the results table: the run's metrics that are in the catalogue, in the order of the stages."""
    names = {key: name for _, key, name in PAGE_STAGES}
    rows = []
    for key, listed in CATALOGUE.items():
        metric, chance = run.metric(key), listed.chance
        if metric is None or (metric.value is None and has_labels(run) is False):
            continue
        level = run.metric(chance) if isinstance(chance, str) else Metric(chance) if chance is not None else None
        rows.append(MetricRow(names[key.partition(".")[0]], listed.name, metric, listed.meaning, level))
    return rows


def all_metrics(run: Run) -> list[tuple[str, Metric]]:
    """Return all metrics by dotted key, except values per finding."""
    found: list[tuple[str, Metric]] = []
    for _, key, _ in PAGE_STAGES:
        values = {name: value for name, value in run.metrics.get(key, {}).items() if name != "left_out"}
        found.extend(
            (path, metric) for path, metric in _flatten(key, values) if not any(part in path for part in _BY_FINDING)
        )
    return found


_BY_FINDING = (".per_finding", ".findings.", ".positives.", ".negatives.")


def _flatten(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Metric]]:
    for name, value in values.items():
        metric = to_metric(value)
        if metric is not None:
            yield f"{prefix}.{name}", metric
        elif isinstance(value, Mapping):
            yield from _flatten(f"{prefix}.{name}", value)


def per_finding(run: Run, stage: str) -> dict[str, Metric]:
    """Return the AUROC by finding of a stage (`zero_shot` or `classifier`); {} if there is none."""
    values = run.metrics.get(stage, {}).get("per_finding")
    found: dict[str, Metric] = {}
    if isinstance(values, Mapping):
        for name, value in values.items():
            inner = value.get("auroc") if isinstance(value, Mapping) and "value" not in value else value
            metric = to_metric(inner)
            if metric is not None:
                found[str(name)] = metric
    return found


def tiles(run: Run) -> list[Tile]:
    """Return the four headline metrics, each with its chance level, or the reason why it is missing."""
    jaccard, random = run.metric("retrieval.jaccard_at_1"), run.metric("retrieval.jaccard_random")
    against = ""
    if jaccard and random and jaccard.value is not None and random.value:
        against = f"{jaccard.value / random.value:.1f} times a random X-ray's {random.value:.3f}"
    f1, bleu = run.metric("report.findings_f1"), run.metric("report.bleu4")
    bleu_words = f"BLEU-4 {bleu.value:.3f}" if bleu and bleu.value is not None else ""
    report = Tile("Generated reports, findings F1", f1, bleu_words)
    if (f1 is None or f1.value is None) and bleu_words:
        report = Tile("Generated reports, BLEU-4", bleu, "findings F1 is not defined here")
    drawn = [
        Tile("Zero-shot, macro AUROC", run.metric("zero_shot.macro_auroc"), "chance 0.5"),
        Tile("Retrieval, findings Jaccard@1", jaccard, against),
        Tile("Classifier, macro AUROC", run.metric("classifier.macro_auroc"), "chance 0.5"),
        report,
    ]
    folders = ["zero_shot", "index", "classifier", "report"]
    recall, by_chance = run.metric("alignment.recall_at_5"), run.metric("alignment.recall_at_5_random")
    if has_labels(run) is False and recall and recall.value is not None:
        level = f"chance {by_chance.value:.3f}" if by_chance and by_chance.value is not None else ""
        drawn[1], folders[1] = Tile("Report to volume, recall@5", recall, level), "align"
    return [
        tile if tile.metric and tile.metric.value is not None else Tile(tile.title, None, _why_missing(run, folder))
        for tile, folder in zip(drawn, folders, strict=True)
    ]


@dataclass(frozen=True)
class Beside:
    """Generated reports compared with the baselines: names, one row per score, and a conclusion in words."""

    names: list[str]
    rows: list[tuple[str, list[Metric | None]]]
    verdict: str


def report_baselines(run: Run) -> Beside | None:
    """Return the scores of the decoder and of each baseline, or None if no report was generated."""
    report = run.metrics.get("report", {})
    baselines = report.get("baselines")
    if not isinstance(baselines, Mapping) or not baselines:
        return None
    columns = [report, *baselines.values()]
    rows = []
    for key, title in REPORT_SCORES.items():
        found = [to_metric(column.get(key)) if isinstance(column, Mapping) else None for column in columns]
        if any(metric is not None and metric.value is not None for metric in found):
            rows.append((title, found))
    names = ["The decoder", *(BASELINE_NAMES.get(name, str(name)) for name in baselines)]
    return Beside(names, rows, str(report.get("verdict") or ""))


def has_labels(run: Run) -> bool | None:
    """Return whether the CT manifest has label columns, or None without a manifest."""
    return bool(run.ct.finding_names) if run.ct is not None else None


def _why_missing(run: Run, folder: str) -> str:
    if has_labels(run) is False and folder != "report":
        return "skipped: no label columns"
    state = run.states.get(folder, "not run")
    return {"done": "not defined for this cohort", "under way": "running or interrupted"}.get(state, "not run yet")


def stage_states(run: Run) -> dict[str, str]:
    """Return the state of each stage in words, by folder; a stage that this run does not need is "not needed"."""
    states: dict[str, str] = {folder: run.states.get(folder, "not run") for folder, _, _ in PAGE_STAGES}
    if has_labels(run) is False:
        states["classifier"] = "skipped"
    if states["expert"] == "not run" and states["index"] == "done":
        states["expert"] = "not needed"  # a pretrained expert was used
    return states


def missing_parts(run: Run) -> list[str]:
    """Return sentences about missing parts of the page and their reasons."""
    sentences = []
    if run.ct is None:
        sentences.append("The CT manifest could not be read: studies, images and ROC curves are missing.")
    elif not run.ct.finding_names:
        sentences.append("This cohort has no label columns: label-based scores are missing.")
    elif run.xray is not None and not run.xray.finding_names:
        sentences.append("The X-ray manifest has no label columns: the findings of retrieved X-rays were not compared.")
    states = stage_states(run)
    waiting: dict[str, list[str]] = {}
    for folder, _, name in PAGE_STAGES:
        state = states[folder]
        waiting.setdefault(state, []).append(name)
    if "under way" in waiting:
        sentences.append(f"Running or interrupted: {', '.join(waiting['under way'])}.")
    if "not run" in waiting:
        sentences.append(f"Not run yet: {', '.join(waiting['not run'])}.")
    return [*sentences, *run.notes]
