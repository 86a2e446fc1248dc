"""Read a run folder for the page: whatever is there, with a plain note about whatever is not.

The page is also built while a run is under way or after it broke off, so nothing here raises because of a file that is
missing, half written or of an unexpected form: the part is left out and a note says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.errors import InputError
from ctx_distill.run_files import (
    CORRECTED,
    LOG,
    METRICS_FILE,
    PREDICTIONS,
    REPORTS,
    RETRIEVAL,
    RUN_FILE,
    ZERO_SHOT_PREDICTIONS,
)
from ctx_distill.runs.stage_table import STAGES

if TYPE_CHECKING:
    from ctx_distill.data.manifests.manifest import Manifest

State = Literal["done", "under way", "not run"]

PAGE_STAGES = tuple((stage.folder, stage.metrics_key, stage.heading) for stage in STAGES.values())
"""Folder, metrics key and heading of each stage, in the order in which they run."""


CORRECTED_COLUMNS = (
    "study_id", "other_study_id", "kept_as", "evidence", "strength", "suspected_batches", "corrected_batches",
    "corrected_epochs", "first_epoch", "last_epoch", "labels_known", "labels_differ",
)  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """A measured value with its 95 % interval, each None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are known."""
        return self.low is not None and self.high is not None


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        folder: the run folder.
        info: `run.json`, {} where it is missing.
        metrics: `metrics.json` by key (`expert`, `retrieval`, ...), joined from the stages where it is not there yet.
        ct: the CT manifest, or None.
        xray: the X-ray manifest, or None.
        zero_shot: `study_id` and a probability a finding, or None.
        classifier: the same of the supervised classifier.
        retrieval: the retrieved X-rays, or None.
        reports: reference and generated reports, or None.
        corrected: pairs that stage 3 took for false negatives, or None.
        logs: CSV log of each stage that has one, by folder name.
        states: state of each stage, by folder name.
        notes: sentences about what could not be read.
    """

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    ct: Manifest | None = None
    xray: Manifest | None = None
    zero_shot: pd.DataFrame | None = None
    classifier: pd.DataFrame | None = None
    retrieval: pd.DataFrame | None = None
    reports: pd.DataFrame | None = None
    corrected: pd.DataFrame | None = None
    logs: dict[str, pd.DataFrame] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def metric(self, key: str) -> Metric | None:
        """A metric by its dotted key, such as `zero_shot.macro.f1`; None where it was not written."""
        *parts, name = key.split(".")
        values: Any = self.metrics
        for part in parts:
            values = mapping(values).get(part)
        return to_metric(values[name]) if isinstance(values, Mapping) and name in values else None


def to_metric(value: object) -> Metric | None:
    """Read a metric: a number, null, or a mapping with `value`, `low`, `high`; None for anything else."""
    if value is None:
        return Metric(None)
    if isinstance(value, Mapping):
        if "value" not in value:
            return None
        return Metric(to_number(value["value"]), to_number(value.get("low")), to_number(value.get("high")))
    number = to_number(value)
    return Metric(number) if isinstance(value, int | float) and not isinstance(value, bool) else None


def to_number(value: object) -> float | None:
    """A finite float, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def mapping(value: object) -> dict[str, Any]:
    """The value where it is a mapping, else {}."""
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def gather(folder: Path) -> Run:
    """Read everything that the page shows.

    Args:
        folder: a run folder, finished or not.

    Raises:
        InputError: where the folder does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder; name the folder given as --run to `ctx-distill all`")
    notes: list[str] = []
    info = mapping(_read_json(folder / RUN_FILE, notes))
    joined = mapping(_read_json(folder / METRICS_FILE, notes))
    metrics = {key: mapping(value) for key, value in joined.items()}
    logs: dict[str, pd.DataFrame] = {}
    states: dict[str, State] = {}
    for name, key, _ in PAGE_STAGES:
        stage = folder / name
        if not metrics.get(key):
            own = mapping(_read_json(stage / METRICS_FILE, notes))
            metrics[key] = mapping(own[key]) if set(own) == {key} else own
        log = _read_table(stage / LOG, (), notes)
        if log is not None:
            logs[name] = log
        states[name] = "done" if metrics[key] else "under way" if stage.is_dir() else "not run"
    zero_shot = folder / ZERO_SHOT_PREDICTIONS
    reports = folder / REPORTS
    return Run(
        folder=folder,
        info=info,
        metrics=metrics,
        ct=_read_manifest(folder, info, "ct", notes),
        xray=_read_manifest(folder, info, "xray", notes),
        zero_shot=_read_predictions(zero_shot if zero_shot.is_file() else folder / "zero_shot/predictions.csv", notes),
        classifier=_read_predictions(folder / "classifier" / PREDICTIONS, notes),
        retrieval=_read_table(folder / "index" / RETRIEVAL, ("study_id", "rank", "xray_image_id", "similarity"), notes),
        reports=_read_table(
            reports if reports.is_file() else folder / "report" / REPORTS,
            ("study_id", "reference", "generated"),
            notes,
        ),
        corrected=_read_table(folder / "align" / CORRECTED, CORRECTED_COLUMNS, notes),
        logs=logs,
        states=states,
        notes=tuple(notes),
    )


def _tolerant(path: Path, read: Callable[[], Any], notes: list[str]) -> Any:
    """Call `read`; a failure becomes a note and None."""
    try:
        return read()
    except (OSError, ValueError, KeyError) as error:
        notes.append(f"{path.name} could not be read and was left out: {error}")
        return None


def _read_json(path: Path, notes: list[str]) -> Any:
    """A JSON file, or None."""
    if not path.is_file():
        return None
    return _tolerant(path, lambda: json.loads(path.read_text(encoding="utf-8")), notes)


def _read_table(path: Path, columns: tuple[str, ...], notes: list[str]) -> pd.DataFrame | None:
    """A CSV file whose ids and texts stay strings; None where it is missing, empty or lacks one of the columns."""
    if not path.is_file() or path.stat().st_size == 0:
        return None
    texts = (
        "study_id",
        "other_study_id",
        "kept_as",
        "evidence",
        "xray_study_id",
        "xray_image_id",
        "split",
        "reference",
        "generated",
    )
    frame = _tolerant(path, lambda: pd.read_csv(path, dtype=dict.fromkeys(texts, "str")), notes)
    if not isinstance(frame, pd.DataFrame):
        return None
    lacking = [name for name in columns if name not in frame.columns]
    if lacking:
        notes.append(f"{path.name} was left out: it lacks the column {', '.join(lacking)}")
        return None
    held = [name for name in texts if name in frame.columns]
    frame[held] = frame[held].fillna("")
    return frame


def _read_predictions(path: Path, notes: list[str]) -> pd.DataFrame | None:
    """Probabilities by study: the index is `study_id`, a float column a finding, rows of one study averaged."""
    frame = _read_table(path, ("study_id",), notes)
    if frame is None:
        return None
    values = frame.drop(columns=["study_id"]).select_dtypes("number").astype(float)
    return values.groupby(frame["study_id"]).mean()


def _read_manifest(folder: Path, info: Mapping[str, Any], key: str, notes: list[str]) -> Manifest | None:
    """The manifest that run.json names, found from the working folder or from the run folder."""
    named = info.get(key)
    text = named.get("path") if isinstance(named, Mapping) else named
    if not isinstance(text, str) or not text:
        return None
    candidates = [place / f"{key}.csv" if place.is_dir() else place for place in (Path(text), folder / text)]
    path = next((place for place in candidates if place.is_file()), None)
    if path is None:
        notes.append(f"The {'CT' if key == 'ct' else 'X-ray'} manifest {text} is not there any more.")
        return None
    found: Manifest | None = _tolerant(path, lambda: read_manifest(path, check_images=False), notes)
    return found
