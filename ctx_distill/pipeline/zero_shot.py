"""`ctx-distill zero-shot CHECKPOINT MANIFEST`: a finished model asked about any manifest, and the tables that it prints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ctx_distill.errors import InputError
from ctx_distill.files import write_json, write_text
from ctx_distill.metrics.findings_report import MEASURES
from ctx_distill.metrics.protocols import CT_RATE_ROWS, RETRIEVAL_ROWS, comparability
from ctx_distill.metrics.report_retrieval import DIRECTIONS, RANKS
from ctx_distill.pipeline.plan import ARTEFACT, STAGES, merge, read_layer, stages_folder
from ctx_distill.pipeline.run_folder import METRICS_FILE, REQUEST_FILE, is_first_process
from ctx_distill.pipeline.runner import fill
from ctx_distill.pipeline.table import aligned, show

Lines = list[tuple[str, ...]]


@dataclass(frozen=True)
class Asked:
    """What is asked; see `tasks/zero_shot.py: Prompts`. `out`: None is `<manifest>.zero_shot` beside the manifest."""

    checkpoint: Path
    manifest: Path
    out: Path | None = None
    protocol: str | None = None
    vocabulary: str | None = None
    templates: str = "normal"
    split: str = "test"
    synonyms: bool = True


def find_artefact(checkpoint: Path) -> Path:
    """The stage-3 artefact of its own folder, of a stage's folder or of a run folder.

    Raises:
        InputError: there is none.
    """
    places = (checkpoint, checkpoint / ARTEFACT, checkpoint / STAGES["align"].folder / ARTEFACT)
    for place in places:
        if (place / "artefact.json").is_file():
            return place
    raise InputError(
        f"{checkpoint}: holds no stage-3 artefact (looked for {', '.join(str(place / 'artefact.json') for place in places)});"
        " give a run folder or RUN/align/artefact, after make stage-3."
    )


def evaluate(asked: Asked, overrides: list[str]) -> str:
    """Ask a model about a manifest; writes `metrics.json`, `predictions.csv`, `retrieval.csv` and `table.md`.

    Args:
        asked: model, data and prompts.
        overrides: of LightningCLI, such as `--trainer.accelerator=gpu`.

    Returns:
        The tables, and where the files are.

    Raises:
        InputError: bad input.
    """
    artefact = find_artefact(asked.checkpoint)
    if not asked.manifest.is_file():
        raise InputError(f"{asked.manifest}: no such manifest; expected a .csv or .parquet of CTs: check the path.")
    out = asked.out or asked.manifest.with_name(f"{asked.manifest.stem}.zero_shot")
    if (out / REQUEST_FILE).is_file():
        raise InputError(f"{out}: is the folder of a stage, whose result would be lost; give another one with --out.")
    from ctx_distill.checkpoint import read_artefact
    from ctx_distill.pipeline.lightning import build

    spec = read_artefact(artefact, "dual-encoder").config["volume_spec"]
    folder = stages_folder()
    config = merge(read_layer(folder / "base.yaml"), read_layer(folder / STAGES["zero-shot"].config))
    own = {
        "model": {"init_args": {
            "templates": asked.templates, "split": asked.split, "synonyms": asked.synonyms,
            "vocabulary": asked.vocabulary or "ct-rate",
            "protocol": asked.protocol or ("vocabulary" if asked.vocabulary else "labels"),
        }},
        "data": {"init_args": {"volume": spec, "needs_training": False}},
        "trainer": {"logger": False},
    }  # fmt: skip
    paths = {"{model}": str(artefact), "{ct}": str(asked.manifest), "{folder}": str(out)}
    layers = out / "layers.yaml"
    # by every rank, all with the same words: none waits for another to have written them
    write_text(layers, yaml.safe_dump(fill(merge(config, own), paths), sort_keys=False))
    cli = build(["--config", str(layers), *overrides])
    metrics: dict[str, Any] = cli.model.run(cli.trainer, cli.datamodule, out)
    if not metrics["studies"]:
        raise InputError(f"{asked.manifest}: no row has split `{asked.split}`; give another one with --split.")
    if not is_first_process():
        return ""
    write_text(out / "table.md", _markdown(metrics))
    write_json(out / METRICS_FILE, metrics)
    return f"{zero_shot_text(metrics)}\n\nresults: {out / METRICS_FILE}, predictions.csv, retrieval.csv, table.md"


def zero_shot_tables(metrics: dict[str, Any]) -> list[tuple[str, Lines]]:
    """Title and lines, the header first, of each table: findings, retrieval, published rows."""
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
        lines += [(row.model, show(row.auroc), show(row.weighted_f1), show(row.accuracy)) for row in CT_RATE_ROWS]
        tables.append((f"Beside published rows. {comparability(metrics)}", lines))
    if found:
        lines = [("report to volume, CT-RATE (1,564 studies)", *(f"recall@{k}" for k in RANKS))]
        lines.append(
            ("this run, own study alone", *(show(found["report_to_volume"][f"strict_recall_at_{k}"]) for k in RANKS))
        )
        lines += [(name, *(show(row.get(k)) for k in RANKS)) for name, row in RETRIEVAL_ROWS]
        tables.append((f"Beside published rows. {_retrieval_words(metrics, found)}", lines))
    return tables


def _retrieval_words(metrics: dict[str, Any], found: dict[str, Any]) -> str:
    if metrics.get("synthetic"):
        return "NOT COMPARABLE: synthetic phantoms here, CT-RATE's patients there."
    return f"Recall@k falls with the number of studies: {found['studies']} here, 1,564 there; other data sets are not comparable."


def _notes(metrics: dict[str, Any]) -> list[str]:
    told = []
    if not metrics.get("macro"):
        told.append("No label column of what was asked: predictions and retrieval only, no scores.")
    elif metrics["not_scored"]:
        told.append(f"No label column, so not scored: {', '.join(metrics['not_scored'])}.")
    told += [f"{name}: no threshold, {own['threshold_reason']}." for name, own in metrics.get("findings", {}).items()
             if own["threshold_reason"]]  # fmt: skip
    if metrics.get("macro"):
        told.append(f"Threshold: {metrics['threshold_rule']}.")
    if metrics.get("macro_auroc_by_reconstruction") is not None:
        told.append(f"Macro AUROC with a row a reconstruction: {show(metrics['macro_auroc_by_reconstruction'])}.")
    if metrics.get("retrieval"):
        told.append(f"Retrieval: {metrics['retrieval']['rule']}.")
    told.append("A research tool, not a medical device.")
    return told


def zero_shot_text(metrics: dict[str, Any]) -> str:
    """The tables as they are printed: of the findings' measures those that a person reads first, all else in table.md."""
    parts = []
    for title, lines in zero_shot_tables(metrics):
        if lines[0][0] == "finding":
            f1 = 6 if metrics["protocol"] == "fvlm-16" else 5
            lines = [(*line[:5], line[f1], line[8], line[9], line[11]) for line in lines]
        parts.append("\n".join([title, *aligned(lines)]))
    return "\n\n".join([*parts, "\n".join(_notes(metrics))])


def _markdown(metrics: dict[str, Any]) -> str:
    parts = ["# Zero-shot"]
    for title, lines in zero_shot_tables(metrics):
        rows = [f"| {' | '.join(line)} |" for line in lines]
        rows.insert(1, "|" + " --- |" * len(lines[0]))
        parts.append("\n".join([title, "", *rows]))
    return "\n\n".join([*parts, *_notes(metrics)]) + "\n"
