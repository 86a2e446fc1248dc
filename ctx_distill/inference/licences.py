"""The licence of every part of a model, as far as the run, the artefacts and the sources of the data state it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ctx_distill.inference.parts import Parts
from ctx_distill.models.decoder_artefact import BASE_FILE, DECODER_FOLDER
from ctx_distill.models.dual_encoder import PRIOR_FOLDER
from ctx_distill.models.weights import read_license

UNKNOWN = "unknown: find out before you pass this model on"
DATA_LICENCES = {
    "chexpert-plus": "Stanford University Dataset Research Use Agreement: research, no redistribution",
    "ct-rate": "CC BY-NC-SA 4.0, behind an access form; no redistribution",
    "mimic-cxr": "PhysioNet Credentialed Health Data License; training and an agreement are required",
    "open-i": "CC BY-NC-ND 4.0",
    "padchest": "PadChest Dataset Research Use Agreement",
    "rad-chestct": "CC BY-NC-ND 4.0",
}
"""By a manifest's `source`: what data_manifests/<source>.md says."""
PHANTOMS = "apache-2.0 (the embedded phantom cohort, made by this project's code)"


@dataclass(frozen=True)
class CardFacts:
    """Facts that only the person who exports knows.

    Attributes:
        license: licence of the exported weights, as the hub names it; the conditions of the data and the expert apply too.
        data_license: licence of the CT and X-ray data; None takes those of the sources that the manifests name.
        name: name of the model.
    """

    license: str = "other"
    data_license: str | None = None
    name: str = "ctx-distill model"


def licences(parts: Parts, run: Mapping[str, Any], facts: CardFacts) -> list[tuple[str, str]]:
    """Return (part, licence) of the code, the weights, the expert, the data and the base of a decoder.

    Args:
        parts: the parts of the model.
        run: the content of `run.json`.
        facts: facts that the run does not record.

    Returns:
        Pairs; the licence is `UNKNOWN` where nothing states it.
    """
    found = [("code (ctx-distill)", "apache-2.0")]
    found.append(("these weights", UNKNOWN if facts.license == "other" else facts.license))
    found.append(_expert(parts, run))
    found += [("data", facts.data_license)] if facts.data_license is not None else _data(run)
    return found if parts.decoder is None else [*found, *_base(parts)]


def unknown_licences(found: list[tuple[str, str]]) -> list[str]:
    """Return the parts whose licence is unknown."""
    return [part for part, name in found if name == UNKNOWN]


def _expert(parts: Parts, run: Mapping[str, Any]) -> tuple[str, str]:
    expert = run.get("expert") or {}
    licence = expert.get("license", "unknown")
    if licence == "unknown" and parts.dual_artefact is not None:
        licence = read_license(parts.dual_artefact.folder / PRIOR_FOLDER)
    where = str(expert.get("source", ""))
    if licence == "unknown" and where.endswith("expert/artefact") and "expert" in (run.get("stages") or {}):
        return "X-ray expert", "as these weights: trained by the run itself"
    named = f"X-ray expert ({where})" if where.startswith("hf-hub:") else "X-ray expert"
    return named, UNKNOWN if licence == "unknown" else licence


def _data(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for kind, title in (("ct", "chest CT"), ("xray", "chest X-rays")):
        told = run.get(kind) or {}
        if told.get("synthetic"):
            found.append((f"data, {title}", PHANTOMS))
        elif told.get("sources"):
            found += [(f"data, {title}: {name}", DATA_LICENCES.get(str(name), UNKNOWN)) for name in told["sources"]]
        elif told:
            found.append((f"data, {title}", UNKNOWN))
    return found or [("data", UNKNOWN)]


def _base(parts: Parts) -> list[tuple[str, str]]:
    assert parts.decoder is not None
    path = parts.decoder.artefact.folder / DECODER_FOLDER / BASE_FILE
    if not path.is_file():
        return [("report decoder", "as these weights: trained from scratch")]
    base = json.loads(path.read_text(encoding="utf-8"))
    source, licence = str(base["source"]), str(base.get("license") or "unknown")
    name = source if source.startswith("hf-hub:") else source.rstrip("/").rpartition("/")[2]
    there = ", not included" if "lora" in parts.decoder.artefact.config else ""
    part = f"base model of the report decoder ({name}, weights {base['hash'][:12]}{there})"
    return [(part, UNKNOWN if licence == "unknown" else licence)]
