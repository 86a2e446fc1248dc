"""The page of one stage: its sections, facts and inputs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from ctx_distill.reporting.results_section import stage_states
from ctx_distill.run_files import CONFIG_FILE, REQUEST_FILE
from ctx_distill.runs.run_reader import PAGE_STAGES, Run, mapping

LEADS = {
    "expert": "The X-ray expert: an image tower and a text tower, trained on radiographs and their reports.",
    "index": "The retrieval index: for each CT report, the X-rays with the most similar reports.",
    "distill": "Distillation: the CT encoder is trained towards the expert's embeddings of the X-rays retrieved for each CT.",
    "align": "Alignment: contrastive training of CTs and reports, with correction of false negatives.",
    "zero_shot": "Zero-shot: findings predicted by the aligned model with prompts, without labels.",
    "classifier": "The classifier: a head on the CT encoder, trained on labels.",
    "report": "The report decoder: generates a report from a CT's tokens.",
}
# Sections of the run page that a stage's page keeps; the others are built from the stage's files or dropped.
SECTIONS: dict[str, tuple[str, ...]] = {
    "index": ("studies",),
    "align": ("corrections",),
    "zero_shot": ("asked",),
    "classifier": ("few",),
    "report": ("studies", "beside"),
}
STUDY_PARTS_OF: dict[str, tuple[str, ...]] = {"index": ("xray",), "report": ("report",)}


@dataclass(frozen=True)
class StageFacts:
    """A stage for the template: facts, inputs with their fingerprints, and its configuration as YAML."""

    name: str
    lead: str
    facts: tuple[tuple[str, str], ...]
    inputs: tuple[tuple[str, str], ...]
    config: str


def of_stage(run: Run, folder: str) -> Run:
    """Return the run with the results, tables and log of one stage only."""
    key = next(key for place, key, _ in PAGE_STAGES if place == folder)
    return replace(
        run,
        metrics={key: run.metrics.get(key, {})},
        zero_shot=run.zero_shot if folder == "zero_shot" else None,
        classifier=run.classifier if folder == "classifier" else None,
        logs={folder: run.logs[folder]} if folder in run.logs else {},
    )


def stage_facts(run: Run, folder: str, name: str) -> StageFacts:
    """Read a stage's `request.json`, `config.yaml` and entry in run.json; missing facts are skipped."""
    place = run.folder / folder
    try:
        request = mapping(json.loads((place / REQUEST_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        request = {}
    try:
        config = (place / CONFIG_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        config = ""
    recorded = mapping(mapping(run.info.get("stages")).get(folder))
    overrides = request.get("overrides")
    aside = sorted(path.name for path in run.folder.glob(f"{folder}.before-*"))
    key = next(key for stage, key, _ in PAGE_STAGES if stage == folder)
    left_out = mapping(run.metrics.get(key, {}).get("left_out"))
    facts = [
        ("Folder", str(place)),
        ("State", stage_states(run)[folder]),
        ("Seconds", str(recorded["seconds"]) if recorded.get("seconds") is not None else ""),
        ("Preset", str(run.info.get("preset") or "")),
        ("Overrides", " ".join(map(str, overrides)) if isinstance(overrides, list) else ""),
        ("Request", str(request.get("key") or "")),
        ("Artefact", str(recorded.get("fingerprint") or "")),
        ("Images excluded", "; ".join(f"{reason}: {count}" for reason, count in sorted(left_out.items()))),
        ("Earlier results", ", ".join(aside)),
    ]
    inputs = tuple((kind, str(value)) for kind, value in mapping(request.get("inputs")).items())
    return StageFacts(name, LEADS[folder], tuple((fact, value) for fact, value in facts if value), inputs, config)
