"""The section on failures of a run, from the files of its stages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ctx_distill.run_files import CHECKPOINTS
from ctx_distill.runs.run_reader import PAGE_STAGES, Run, mapping, to_number

if TYPE_CHECKING:
    from ctx_distill.data.manifests.manifest import Manifest

LISTED = 20
"""Maximum detail lines per failure; the rest is counted."""
_ATTEMPT = re.compile(r"attempt (\d+) on")


@dataclass(frozen=True)
class Failure:
    """A failure: the folder and name of its stage, a sentence, details and the file with more information."""

    stage: str
    name: str
    what: str
    details: tuple[str, ...] = ()
    more: int = 0
    where: str = ""


def failures(run: Run) -> list[Failure]:
    """Return all failures in the order of the stages."""
    found = []
    for folder, key, name in PAGE_STAGES:
        place = run.folder / folder
        metrics = run.metrics.get(key, {})
        manifest = run.xray if folder in ("expert", "index") else run.ct
        for what, details, where in (
            *_broken_off(run, folder),
            *_bad_losses(place),
            *_set_aside(place, manifest),
            *_not_scored(metrics, bool(run.states.get(folder) == "done")),
            *_reports(metrics if folder == "report" else {}),
        ):
            found.append(Failure(folder, name, what, tuple(details[:LISTED]), max(0, len(details) - LISTED), where))
    return found + _requeues(run.folder / "slurm")


_Entry = tuple[str, list[str], str]


def _broken_off(run: Run, folder: str) -> Iterator[_Entry]:
    """Yield an entry for a stage that started but has no metrics, with its progress and the ranks' last records."""
    if run.states.get(folder) != "under way":
        return
    details = []
    log = run.logs.get(folder)
    if log is not None and len(log):
        reached = [
            f"{word} {int(last)}"
            for word in ("epoch", "step")
            if word in log.columns and pd.notna(last := pd.to_numeric(log[word], errors="coerce").max())
        ]
        values = [
            f"{name} {value:.4g}"
            for name in log.columns
            if name.endswith("/loss") and (value := _last(log[name])) is not None
        ]
        details.append("last line of its log: " + ", ".join([*reached, *values]))
    else:
        details.append("no log")
    checkpoint = run.folder / folder / CHECKPOINTS / "last.ckpt"
    details.append(
        "repeat the command to resume from the last checkpoint"
        if checkpoint.is_file()
        else "no checkpoint: it will start from the beginning"
    )
    for path in sorted((run.folder / folder / "ranks").glob("rank-*.json")):
        record = mapping(_json(path))
        line = (
            f"rank {record.get('rank', '?')} at step {record.get('step', '?')}: {record.get('phase', '?')}, "
            f"{record.get('at', '?')}"
        )
        details.append(line + (f"; ended: {record['ended']}" if record.get("ended") else ""))
    yield "Running or interrupted: the stage has not written its metrics.", details, f"{folder}/"


def _bad_losses(place: Path) -> Iterator[_Entry]:
    """Yield entries for skipped steps, and for the dumps of failed training."""
    training = mapping(_json(place / "training.json"))
    skipped, steps = to_number(training.get("skipped_steps")), to_number(training.get("steps"))
    if skipped:
        of = f" of {int(steps):,}" if steps else ""
        what = f"{int(skipped):,}{of} steps were skipped: their loss or gradient was not finite."
        yield what, [], f"{place.name}/logs/metrics.csv, train/skipped_steps"
    for path in sorted((place / "fault").glob("step-*.json")):
        fault = mapping(_json(path))
        ranks = [mapping(one) for one in fault.get("ranks") or []]
        losses = [_short(loss) for one in ranks for loss in one.get("losses") or []]
        rows = [str(row) for one in ranks for batch in one.get("rows") or [] for row in batch]
        bad = mapping(fault.get("not_finite"))
        details = [
            f"loss {', '.join(losses) or 'not known'}; gradient norm {_short(fault.get('gradient_norm'))}; "
            f"last finite norms {', '.join(_short(one) for one in (fault.get('last_norms') or [])[-3:]) or 'none'}",
            f"manifest rows of the batch: {', '.join(rows[:32]) or 'not known'}{' …' if len(rows) > 32 else ''}",
        ]
        details += [f"non-finite {kind}: {len(names)}" for kind, names in sorted(bad.items()) if names]
        what = f"Training failed at step {fault.get('step', '?')} (epoch {fault.get('epoch', '?')}): too many bad steps in a row."
        yield what, details, f"{place.name}/fault/{path.name}"


def _set_aside(place: Path, manifest: Manifest | None) -> Iterator[_Entry]:
    """Yield entries for images that could not be read during training."""
    for path in sorted(place.rglob("set_aside.csv")):
        try:
            table = pd.read_csv(path, dtype={"reason": str})
            rows, reasons = table["row"].astype(int).tolist(), table["reason"].fillna("").tolist()
        except (OSError, ValueError, KeyError):
            continue
        details = []
        for row, reason in zip(rows, reasons, strict=True):
            known = manifest is not None and row in manifest.frame.index
            name = str(manifest.frame.at[row, "image_id"]) if manifest is not None and known else f"row {row}"
            details.append(f"{name}: {reason}")
        one = len(rows) == 1
        what = f"{len(rows):,} image{' was' if one else 's were'} unreadable and replaced by {'another' if one else 'others'}."
        yield what, details, str(path.relative_to(place.parent))


def _not_scored(metrics: dict[str, Any], done: bool) -> Iterator[_Entry]:
    """Yield entries for a skipped stage, and for findings without a score or a threshold."""
    if isinstance(metrics.get("left_out"), str):
        yield f"Skipped: {metrics['left_out']}.", [], ""
    unlabelled = metrics.get("not_scored")
    if isinstance(unlabelled, list) and unlabelled:
        yield "Predicted but not scored, because they have no label column.", [", ".join(map(str, unlabelled))], ""
    positives, negatives = mapping(metrics.get("positives")), mapping(metrics.get("negatives"))
    undefined = []
    for name, value in sorted(mapping(metrics.get("per_finding")).items()) if done else ():
        held = mapping(value)
        if value is None or ("value" in held and held["value"] is None):
            counts = [to_number(side.get(name)) for side in (positives, negatives)]
            have, lack = ("?" if count is None else f"{int(count)}" for count in counts)
            undefined.append(f"{name}: {have} studies with and {lack} without it")
    if undefined:
        yield "Findings without a score, because the scored studies lack one of the classes.", undefined, ""
    reasons = [
        f"{name}: {own['threshold_reason']}"
        for name, value in sorted(mapping(metrics.get("findings")).items())
        if (own := mapping(value)).get("threshold_reason")
    ]
    if reasons:
        yield "Findings without a threshold, and so without false positives and negatives.", reasons, ""


def _reports(metrics: dict[str, Any]) -> Iterator[_Entry]:
    """Yield an entry for empty generated reports."""
    empty, reports = to_number(metrics.get("empty")), to_number(metrics.get("reports"))
    if empty:
        yield f"{int(empty):,} of {int(reports or 0):,} generated reports are empty.", [], "reports.csv"


def _requeues(place: Path) -> list[Failure]:
    """Return the SLURM jobs that were requeued, with the lines of their logs about it."""
    names, requeued = {folder: name for folder, _, name in PAGE_STAGES}, []
    for path in sorted(place.glob("*.out")):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        attempts = [int(one.group(1)) for line in lines if (one := _ATTEMPT.search(line))]
        if max(attempts, default=1) > 1:
            again, job = max(attempts) - 1, path.stem.rsplit("-", 1)[0].replace("-", "_")
            messages = tuple(line for line in lines if "requeued" in line)
            what = f"Its SLURM job was requeued {again} time{'s' if again > 1 else ''}."
            requeued.append(
                Failure(job, names.get(job, f"Job {job}"), what, messages[:LISTED], 0, f"slurm/{path.name}")
            )
    return requeued


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _last(column: pd.Series) -> float | None:
    held = pd.to_numeric(column, errors="coerce").dropna()
    return float(held.iloc[-1]) if len(held) else None


def _short(value: object) -> str:
    number = to_number(value)
    return f"{number:.4g}" if number is not None else str(value)
