"""`ctx-distill evaluate`: zero-shot evaluation of a finished model on any manifest."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ctx_distill.errors import InputError
from ctx_distill.files import write_json, write_text
from ctx_distill.metrics.zero_shot_table import zero_shot_notes, zero_shot_tables
from ctx_distill.run_files import ARTEFACT, ARTEFACT_FILE, LAYERS_FILE, METRICS_FILE, REQUEST_FILE
from ctx_distill.runs.overrides import check_overrides
from ctx_distill.runs.result_table import aligned
from ctx_distill.runs.run_folder import is_first_process
from ctx_distill.runs.runner import fill
from ctx_distill.runs.stage_table import STAGES, merge, read_layer, stages_folder


@dataclass(frozen=True)
class Query:
    """A query; see `stages/zero_shot/task.py: Prompts`. `out`: None is `<manifest>.zero_shot` beside the manifest."""

    checkpoint: Path
    manifest: Path
    out: Path | None = None
    protocol: str | None = None
    vocabulary: str | None = None
    templates: str = "normal"
    split: str = "test"
    synonyms: bool = True


def find_artefact(checkpoint: Path) -> Path:
    """Return the stage-3 artefact in its folder, in a stage's folder or in a run folder.

    Raises:
        InputError: the folder holds none.
    """
    places = (checkpoint, checkpoint / ARTEFACT, checkpoint / STAGES["align"].folder / ARTEFACT)
    for place in places:
        if (place / ARTEFACT_FILE).is_file():
            return place
    raise InputError(
        f"{checkpoint}: holds no stage-3 artefact (looked for {', '.join(str(place / 'artefact.json') for place in places)});"
        " give a run folder or RUN/align/artefact, after `ctx-distill align`."
    )


def evaluate_zero_shot(query: Query, overrides: list[str]) -> str:
    """Evaluate a model on a manifest; write `metrics.json`, `predictions.csv`, `retrieval.csv` and `table.md`.

    Args:
        query: model, data and prompts.
        overrides: LightningCLI overrides, such as `--trainer.accelerator=gpu`.

    Returns:
        The tables, and where the files are.

    Raises:
        InputError: bad input.
    """
    check_overrides([STAGES["zero-shot"]], "demo", overrides)
    artefact = find_artefact(query.checkpoint)
    if not query.manifest.is_file():
        raise InputError(f"{query.manifest}: no such manifest; expected a .csv or .parquet of CTs: check the path.")
    out = query.out or query.manifest.with_name(f"{query.manifest.stem}.zero_shot")
    if (out / REQUEST_FILE).is_file():
        raise InputError(
            f"{out}: is the folder of a stage, whose result would be overwritten. Give another one with --out."
        )
    from ctx_distill.checkpoint import read_artefact
    from ctx_distill.runs.lightning_cli import build, run_task

    spec = read_artefact(artefact, "dual-encoder").config["volume_spec"]
    folder = stages_folder()
    config = merge(read_layer(folder / "base.yaml"), read_layer(folder / STAGES["zero-shot"].config))
    own = {
        "model": {"init_args": {
            "templates": query.templates, "split": query.split, "synonyms": query.synonyms,
            "vocabulary": query.vocabulary or "ct-rate",
            "protocol": query.protocol or ("vocabulary" if query.vocabulary else "labels"),
        }},
        "data": {"init_args": {"volume": spec, "needs_training": False}},
        "trainer": {"logger": False},
    }  # fmt: skip
    paths = {"{model}": str(artefact), "{ct}": str(query.manifest), "{folder}": str(out)}
    filled = yaml.safe_dump(fill(merge(config, own), paths), sort_keys=False)
    if is_first_process():
        write_text(out / LAYERS_FILE, filled)
    with tempfile.TemporaryDirectory() as scratch:  # one file per rank: no rank waits for another
        layers = Path(scratch) / LAYERS_FILE
        layers.write_text(filled, encoding="utf-8")
        cli = build(["--config", str(layers), *overrides])
    metrics = run_task(cli, out)
    if not metrics["studies"]:
        raise InputError(f"{query.manifest}: no row has split `{query.split}`; give another one with --split.")
    if not is_first_process():
        return ""
    write_json(out / METRICS_FILE, metrics)
    return f"{zero_shot_text(metrics)}\n\nresults: {out / METRICS_FILE}, predictions.csv, retrieval.csv, table.md"


def zero_shot_text(metrics: dict[str, Any]) -> str:
    """Return the printed tables: the main measures per finding; table.md has all of them."""
    parts = []
    for title, lines in zero_shot_tables(metrics):
        if lines[0][0] == "finding":
            f1 = 6 if metrics["protocol"] == "fvlm-16" else 5
            lines = [(*line[:5], line[f1], line[8], line[9], line[11]) for line in lines]
        parts.append("\n".join([title, *aligned(lines)]))
    return "\n\n".join([*parts, "\n".join(zero_shot_notes(metrics))])
