"""Differences between runs: the settings of their stages, and the data that they were scored on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ctx_distill.reporting.studies_section import label_table
from ctx_distill.run_files import CONFIG_FILE
from ctx_distill.runs.run_reader import PAGE_STAGES, Run, mapping

_OWN = ("trainer.default_root_dir", "trainer.logger")
"""Paths of a run and its manifests are not compared; the manifests' fingerprints are compared instead."""


def setting_rows(runs: Sequence[Run]) -> list[tuple[str, str, list[str]]]:
    """Return (stage, key, value per run) for every key of the resolved `config.yaml` that differs; "–" without the key."""
    rows = []
    for folder, _, title in PAGE_STAGES:
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
    """Return a stage's settings by dotted key, with the run's folder written as RUN, or None if it was not run."""
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
    """Return sentences about differences in the data that make the runs' metrics incomparable."""
    sentences = []
    first = runs[0]
    for run, name in zip(runs[1:], names[1:], strict=True):
        for key, title in (("ct", "CT"), ("xray", "X-ray")):
            mine, theirs = (mapping(of.info.get(key)).get("fingerprint") for of in (run, first))
            if mine and theirs and mine != theirs:
                sentences.append(
                    f"{name} has another {title} cohort than {names[0]}: metrics on it are not comparable."
                )
        if run.ct is None or first.ct is None:
            continue
        studies, base = (set(of.ct.split("test").frame["study_id"]) for of in (run, first) if of.ct is not None)
        if studies != base:
            sentences.append(
                f"{name} was scored on {len(studies)} test studies, {names[0]} on {len(base)}, with"
                f" {len(studies & base)} in common: metrics are not comparable."
            )
        elif run.ct.finding_names and first.ct.finding_names and not _same_labels(run, first):
            sentences.append(
                f"{name} and {names[0]} have different labels for the same test studies: metrics are not comparable."
            )
        for key, title, mine, theirs in (
            ("zero_shot", "zero-shot", run.zero_shot, first.zero_shot),
            ("classifier", "the classifier", run.classifier, first.classifier),
        ):
            if mine is not None and theirs is not None and set(mine.columns) != set(theirs.columns):
                sentences.append(
                    f"{name} and {names[0]} predicted different findings with {title} ({len(set(mine.columns) & set(theirs.columns))} in"
                    f" common): means over findings ({key}.macro) are not comparable."
                )
    return sentences


def _same_labels(one: Run, other: Run) -> bool:
    assert one.ct is not None
    assert other.ct is not None
    mine, theirs = (label_table(of.split("test")).sort_index() for of in (one.ct, other.ct))
    return bool(mine.equals(theirs))
