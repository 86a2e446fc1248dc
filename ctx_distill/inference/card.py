"""The model card of an export: what it is, of what data and licences, how well it does, what it is not for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ctx_distill.inference.licences import CardFacts, licences
from ctx_distill.inference.parts import Parts
from ctx_distill.metrics.bootstrap import show
from ctx_distill.run_files import METRICS_FILE, RUN_FILE


def model_card(
    parts: Parts, facts: CardFacts, programs: Mapping[str, Mapping[str, Sequence[str]]] | None = None
) -> str:
    """Markdown with YAML in front, as the hub reads it; no path of this machine, no patient data.

    Args:
        parts: of the model.
        facts: what only the person who exports knows.
        programs: torch.export programs beside it: inputs and outputs by file.
    """
    run = read_record(parts.source / RUN_FILE)
    metrics = read_record(parts.source / METRICS_FILE)
    spec = parts.spec
    front = ModelCardData(license=facts.license, library_name="ctx-distill", tags=["chest-ct", "radiology", "research"])
    lines = [
        f"# {facts.name}",
        "> **A research tool, not a medical device.** Nothing that it says is a diagnosis; it has not been evaluated for"
        " clinical use.",
        "A chest-CT model distilled from a chest X-ray expert with [BIUD](https://arxiv.org/abs/2404.04936)'s method as"
        " ctx-distill implements it.",
        "## What it does",
        *_abilities(parts),
        f"It reads volumes of {' x '.join(map(str, spec.shape))} voxels (z, y, x) of"
        f" {' x '.join(f'{mm:g}' for mm in spec.spacing)} mm, HU from {spec.window[0]:g} to {spec.window[1]:g};"
        " `ctx_distill.load` brings scans to that.",
        "```python\nimport ctx_distill\n\nmodel = ctx_distill.load(FOLDER)\nprint(model.predict('scan.nii.gz').probabilities)\n```",
        *_programs(parts, programs or {}),
        "## Data",
        *_data(run),
        "## Licences",
        "| part | licence |\n| --- | --- |\n" + "\n".join(f"| {part} | {name} |" for part, name in licences(parts, run, facts)),
        "## Metrics",
        _metrics(metrics),
        "## Intended use",
        "Research on chest CT: retrieval, labelling of cohorts for research, a baseline to compare with. By people who check"
        " what it says.",
        "## Limits",
        "- Not for diagnosis, triage or any decision about a patient.\n"
        "- Of populations, scanners, contrast phases and reconstructions other than those of its data nothing is known;"
        " probabilities are not calibrated for them.\n"
        "- It sees nothing outside its field of view and nothing finer than its voxels.\n"
        "- Saliency shows what the model used, not where disease is. A draft report repeats phrases of its training reports"
        " and may be wrong throughout.\n"
        "- Findings that it was not asked for are not reported: silence is no normal study.",
    ]  # fmt: skip
    body = "\n\n".join(lines)
    return str(ModelCard(f"---\n{front.to_yaml()}\n---\n\n{body}\n"))


def read_record(path: Path) -> dict[str, Any]:
    """A JSON mapping; an empty one where the file is missing."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _abilities(parts: Parts) -> list[str]:
    lines = []
    if parts.dual is not None:
        lines.append("- zero-shot findings and an embedding shared with reports: " + ", ".join(parts.asked.findings))
    if parts.classifier is not None:
        lines.append("- a classifier trained on labels: " + ", ".join(parts.classifier.findings))
    if parts.decoder is not None:
        lines.append("- draft reports")
    return ["\n".join(lines)]


def _programs(parts: Parts, programs: Mapping[str, Mapping[str, Sequence[str]]]) -> list[str]:
    if not programs:
        return []
    lines = [
        f"- `{name}`: {', '.join(told['inputs'])} -> {', '.join(told['outputs'])}" for name, told in programs.items()
    ]
    if parts.expert is not None and len(programs.get("image_tower.pt2", {}).get("inputs", ())) < 2:
        lines.append(
            "\n**Its `embedding` leaves out the model's prior** (what the X-ray expert says of the scan's projection), which could not"
            " be exported: it is another than `predict` gives."
        )
    return ["Programs of torch.export, of any batch size:", "\n".join(lines)]


def _data(run: Mapping[str, Any]) -> list[str]:
    rows = []
    for kind, title in (("ct", "chest CT"), ("xray", "chest X-ray")):
        one = run.get(kind)
        if one:
            splits = ", ".join(f"{name} {count}" for name, count in one["splits"].items())
            rows.append(
                f"- {title}: {one['studies']} studies of {one['patients']} patients ({splits}), manifest {one['fingerprint'][:12]}"
            )
    return ["\n".join(rows) or "The run's record does not stand with this model."]


def _metrics(metrics: Mapping[str, Any]) -> str:
    rows = []
    for stage, title in (("zero_shot", "zero-shot"), ("classifier", "classifier")):
        found = metrics.get(stage) or {}
        named = {"macro AUROC": found.get("macro_auroc"), **(found.get("per_finding") or {})}
        rows += [f"| {title} | {name} | {show(value)} |" for name, value in named.items() if value is not None]
    if not rows:
        return "None stand with this model."
    head = "On the `test` split, 95 % bootstrap intervals over patients.\n\n| how | AUROC of | value |\n| --- | --- | --- |\n"
    return head + "\n".join(rows)
