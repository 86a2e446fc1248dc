"""The provenance of a run: the facts of run.json, as far as they are recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ctx_distill.reporting.results_section import stage_states
from ctx_distill.runs.run_reader import PAGE_STAGES, Run, mapping


def how_made(run: Run) -> dict[str, Any]:
    """Return facts, manifests and stages for the template."""
    info = run.info
    expert, spec = mapping(info.get("expert")), mapping(info.get("volume_spec"))
    facts = [
        ("Run folder", str(run.folder)),
        ("Started", info.get("created")),
        ("Command", info.get("command")),
        ("Preset", info.get("preset")),
        ("ctx-distill", info.get("version")),
        ("X-ray expert", expert.get("name") or (info.get("expert") if isinstance(info.get("expert"), str) else None)),
        ("Expert's licence", expert.get("license") or expert.get("licence")),
        ("Expert's fingerprint", expert.get("fingerprint")),
        ("Volume", _spec_words(spec)),
    ]
    states = stage_states(run)
    recorded = mapping(info.get("stages"))
    return {
        "facts": [(name, str(value)) for name, value in facts if value],
        "data": [_data_row(name, info.get(key)) for name, key in (("CT", "ct"), ("X-ray", "xray")) if info.get(key)],
        "stages": [
            (
                name,
                states[folder],
                {"seconds": None, "fingerprint": None, **mapping(recorded.get(folder))},
            )
            for folder, _, name in PAGE_STAGES
        ],
        "left_out": sorted(mapping(run.metrics.get("retrieval", {}).get("left_out")).items()),
    }


def _spec_words(spec: Mapping[str, Any]) -> str | None:
    """Return the volume spec in one line."""
    parts = []
    for key, joint, unit in (("spacing", " × ", "mm"), ("shape", " × ", "voxels (z, y, x)"), ("window", " to ", "HU")):
        value = spec.get(key)
        if isinstance(value, list | tuple):
            parts.append(f"{joint.join(f'{v:g}' if isinstance(v, int | float) else str(v) for v in value)} {unit}")
    return "; ".join(parts) or None


def _data_row(name: str, value: object) -> dict[str, Any]:
    """Return the facts of one manifest from run.json."""
    held = mapping(value) or {"path": value}
    splits = ", ".join(f"{split} {count}" for split, count in mapping(held.get("splits")).items())
    return {
        "name": name,
        "splits": splits,
        **{key: held.get(key) for key in ("path", "images", "studies", "patients", "fingerprint")},
    }
