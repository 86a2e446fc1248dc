"""The page of one stage: which of the run page's sections it has, and what the stage was made of."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from ctx_distill.reporting.results_section import stage_states
from ctx_distill.run_files import CONFIG_FILE, REQUEST_FILE
from ctx_distill.runs.run_reader import STAGES, Run, mapping

LEADS = {
    "expert": "The X-ray expert: an image and a text tower that were trained on radiographs and their reports.",
    "index": "The index: for each CT, the X-rays whose reports are nearest to its own.",
    "distill": "Distillation: a CT encoder learnt from what the X-ray expert says of the X-rays retrieved for each CT.",
    "align": "Alignment: CTs and their reports were brought together, with the pairs that are falsely negative corrected.",
    "zero_shot": "Zero-shot: the aligned model was asked about findings by prompts alone; it saw no label.",
    "classifier": "The classifier: a head on the CT encoder was trained on labels.",
    "report": "The report decoder: it writes a report from a CT's tokens.",
}
# Sections of the run page that a stage's page keeps as they are; the others are made of the stage's own files or left out.
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
    """What the template shows of a stage: facts, inputs with their fingerprints, and its configuration as YAML."""

    name: str
    lead: str
    facts: tuple[tuple[str, str], ...]
    inputs: tuple[tuple[str, str], ...]
    config: str


def of_stage(run: Run, folder: str) -> Run:
    """The run with the results, tables and log of one stage only."""
    key = next(key for place, key, _ in STAGES if place == folder)
    return replace(
        run,
        metrics={key: run.metrics.get(key, {})},
        zero_shot=run.zero_shot if folder == "zero_shot" else None,
        classifier=run.classifier if folder == "classifier" else None,
        logs={folder: run.logs[folder]} if folder in run.logs else {},
    )


def stage_facts(run: Run, folder: str, name: str) -> StageFacts:
    """Read the stage's `request.json`, `config.yaml` and what run.json says of it; what is not there is left out."""
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
    key = next(key for stage, key, _ in STAGES if stage == folder)
    left_out = mapping(run.metrics.get(key, {}).get("left_out"))
    facts = [
        ("Folder", str(place)),
        ("State", stage_states(run)[folder]),
        ("Seconds", str(recorded["seconds"]) if recorded.get("seconds") is not None else ""),
        ("Preset", str(run.info.get("preset") or "")),
        ("Overrides", " ".join(map(str, overrides)) if isinstance(overrides, list) else ""),
        ("Request", str(request.get("key") or "")),
        ("Artefact", str(recorded.get("fingerprint") or "")),
        ("Images left out", "; ".join(f"{reason}: {count}" for reason, count in sorted(left_out.items()))),
        ("Set aside before", ", ".join(aside)),
    ]
    inputs = tuple((kind, str(value)) for kind, value in mapping(request.get("inputs")).items())
    return StageFacts(name, LEADS[folder], tuple((fact, value) for fact, value in facts if value), inputs, config)
