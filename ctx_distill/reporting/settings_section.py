"""What differs between runs: the settings of their stages, and the data that they were scored on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ctx_distill.reporting.studies_section import label_table
from ctx_distill.run_files import CONFIG_FILE
from ctx_distill.runs.run_reader import STAGES, Run, mapping

_OWN = ("trainer.default_root_dir", "trainer.logger")
"""Where a run and its manifests lie is no setting of it; the manifests' fingerprints are compared instead."""


def setting_rows(runs: Sequence[Run]) -> list[tuple[str, str, list[str]]]:
    """(stage, key, value of each run) of every key of the resolved `config.yaml` that differs; "–" without the key."""
    rows = []
    for folder, _, title in STAGES:
        held = [_settings(run.folder, folder) for run in runs]
        if sum(settings is not None for settings in held) < 2:
            continue
        keys = sorted({key for settings in held for key in settings or {}})
        for key in keys:
            values = [None if settings is None else settings.get(key, "–") for settings in held]
            if len({value for value in values if value is not None}) > 1:
                rows.append((title, key, ["not run" if value is None else value for value in values]))
    return rows


def _settings(run: Path, folder: str) -> dict[str, str] | None:
    """A stage's settings by dotted key, the run's own folder written as RUN; None where it was not run."""
    path = run / folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        told = mapping(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, OSError):
        return None
    root = str(Path(str(mapping(told.get("trainer")).get("default_root_dir") or run / folder)).parent)
    return {
        key: str(value).replace(root, "RUN") for key, value in _flatten("", told) if not key.startswith(_OWN) and not key.endswith("_manifest")
    }  # fmt: skip


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flatten(f"{prefix}.{name}" if prefix else str(name), item)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for place, item in enumerate(value):
            yield from _flatten(f"{prefix}.{place}", item)
    else:
        yield prefix.replace(".init_args", ""), value


def data_warnings(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Sentences on what makes the runs' figures not comparable; none where they were scored on the same data."""
    told = []
    first = runs[0]
    for run, name in zip(runs[1:], names[1:], strict=True):
        for key, title in (("ct", "CT"), ("xray", "X-ray")):
            mine, theirs = (mapping(of.info.get(key)).get("fingerprint") for of in (run, first))
            if mine and theirs and mine != theirs:
                told.append(f"{name} has another {title} cohort than {names[0]}: figures on it cannot be compared.")
        if run.ct is None or first.ct is None:
            continue
        studies, base = (set(of.ct.split("test").frame["study_id"]) for of in (run, first) if of.ct is not None)
        if studies != base:
            told.append(
                f"{name} was scored on {len(studies)} test studies, {names[0]} on {len(base)}, of which"
                f" {len(studies & base)} are the same: figures cannot be compared."
            )
        elif run.ct.finding_names and first.ct.finding_names and not _same_labels(run, first):
            told.append(
                f"{name} and {names[0]} have other labels for the same test studies: figures cannot be compared."
            )
        for key, title, mine, theirs in (
            ("zero_shot", "zero-shot", run.zero_shot, first.zero_shot),
            ("classifier", "the classifier", run.classifier, first.classifier),
        ):
            if mine is not None and theirs is not None and set(mine.columns) != set(theirs.columns):
                told.append(
                    f"{name} and {names[0]} were asked for other findings by {title} ({len(set(mine.columns) & set(theirs.columns))} in"
                    f" common): means over findings ({key}.macro) cannot be compared."
                )
    return told


def _same_labels(one: Run, other: Run) -> bool:
    assert one.ct is not None
    assert other.ct is not None
    mine, theirs = (label_table(of.split("test")).sort_index() for of in (one.ct, other.ct))
    return bool(mine.equals(theirs))
