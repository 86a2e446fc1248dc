"""`ctx-distill predict`: many scans, in one process or several; a stopped command resumes."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ctx_distill.errors import InputError
from ctx_distill.files import hash_json, write_bytes, write_json, write_text
from ctx_distill.inference.model import CTModel
from ctx_distill.inference.parts import open_parts
from ctx_distill.inference.prediction import Prediction, Saliency
from ctx_distill.inference.scans import Scan, find_scans, with_progress
from ctx_distill.parallel import DIED, in_processes, usable_cores
from ctx_distill.run_files import REPORTS

PARTS = "parts"
MOST_PROBABLE = 3
WORTH_A_WORKER = 16
"""Number of scans; a worker process takes about ten seconds to import torch and open the model."""

Todo = tuple[Scan, str]
"""A scan, and the key of its request."""


@dataclass(frozen=True)
class Work:
    """The request for every scan; see `predict_scans`."""

    checkpoint: Path
    out: Path
    saliency: tuple[str, ...] | None = None
    report: bool = False
    device: str = "cpu"
    vocabulary: str | None = None


def predict_scans(
    checkpoint: Path,
    given: Path,
    out: Path,
    saliency: Sequence[str] | None = None,
    report: bool = False,
    device: str = "cpu",
    vocabulary: str | None = None,
    workers: int | None = None,
) -> tuple[str, int]:
    """Predict every scan and write the results.

    OUT holds:

    - `probabilities.csv`, one row per scan, unreadable ones included: name, study, path, status `read` or `unreadable`,
      reason, `asked` (the model of the probabilities), and one column per finding;
    - `embeddings.safetensors`: `embeddings` (N, D) float32, in the order of the rows with status `read`;
    - `reports.csv` and `saliency/<scan>/<finding>.nii.gz`;
    - one JSON file per scan, from which a stopped command resumes.

    Scans are computed one by one. With the same number of threads the results are bit-identical in any process. The
    memory holds one model and one volume per process, and the embeddings.

    Args:
        checkpoint: run folder or artefact.
        given: a scan, a folder, or a manifest.
        out: folder to write.
        saliency: findings to write maps of; empty: the three most probable of each scan; None: no maps.
        report: write draft reports.
        device: device to compute on.
        vocabulary: as in `ctx_distill.load`.
        workers: processes, each with its model and one thread; 1 computes in this process. None: on a CPU one per core,
            as long as each has `WORTH_A_WORKER` scans; else 1.

    Returns:
        The summary to print, and the number of scans that could not be read.

    Raises:
        InputError: no model, no scans, two scans with the same file name, or workers below 1.
        StopRequested: a signal asked to stop; the same command resumes.
    """
    if workers is not None and workers < 1:
        raise InputError(f"predict: --workers is {workers}; expected 1 or more.")
    scans = find_scans(given)
    twice = [slug for slug, n in Counter(scan.slug for scan in scans).items() if n > 1]
    if twice:
        raise InputError(f"{given}: several scans would be written as {twice[0]!r}. Rename them, or give a manifest.")
    work = Work(checkpoint, out, None if saliency is None else tuple(saliency), report, device, vocabulary)
    model = CTModel(open_parts(checkpoint, vocabulary)).to(device)
    if report and not model.writes_reports:
        raise InputError(f"{checkpoint}: --report needs a report decoder, and this run has none. Run the report stage.")
    model.saliency_names(saliency or False)  # raises for an unknown finding
    asked = hash_json([model.fingerprint, saliency, report, vocabulary])
    unreadable: dict[str, str] = {}
    todo: list[Todo] = []
    for scan in scans:
        try:
            key = hash_json([asked, scan.name, scan.study, str(scan.file.path), scan.file.stamp()])
        except InputError as error:
            unreadable[scan.name] = str(error)
            continue
        if _part(out, scan, key) is None:
            todo.append((scan, key))
    for (scan, _), reason in _each(model, work, todo, workers):
        if reason is not None:
            unreadable[scan.name] = reason
    return _write(out, scans, unreadable, model, report)


def _each(model: CTModel, work: Work, todo: list[Todo], workers: int | None) -> Iterator[tuple[Todo, str | None]]:
    """Yield every scan with the reason why it could not be read; None if its results are written."""
    if workers is None:
        workers = min(usable_cores(), len(todo) // WORTH_A_WORKER) if work.device == "cpu" else 1
    if min(workers, len(todo)) <= 1:
        return ((item, _one(model, work, item)) for item in with_progress(todo))
    return in_processes("  scans", partial(_in_worker, work), todo, len(todo), workers, died=_died)


def _died(item: Todo) -> str:
    return f"{item[0].file.path}: the process that worked on it {DIED}"


@cache
def _opened(work: Work) -> CTModel:
    """Return a worker's model, opened once."""
    return CTModel(open_parts(work.checkpoint, work.vocabulary)).to(work.device)


def _in_worker(work: Work, item: Todo) -> str | None:
    return _one(_opened(work), work, item)


def _one(model: CTModel, work: Work, item: Todo) -> str | None:
    """Write the results of a scan; return the reason if it cannot be read."""
    scan, key = item
    try:
        found, maps = _found(model, work, scan)
    except InputError as error:  # not recorded: the next command tries again
        return str(error)
    except Exception as error:  # an error of a library on one scan must not stop the others
        return f"{scan.file.path}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    for name, one in maps.items():
        one.write(work.out / "saliency" / scan.slug / f"{name.replace(' ', '_').replace('/', '_')}.nii.gz")
    record = {
        "key": key,
        "asked": found.asked,
        "probabilities": found.probabilities,
        "embedding": [float(x) for x in found.embedding],
        "report": found.report,
        "saliency": list(maps),
    }
    write_json(_place(work.out, scan), record)
    return None


def _found(model: CTModel, work: Work, scan: Scan) -> tuple[Prediction, dict[str, Saliency]]:
    volume = scan.file.read()
    found = model.predict_volume(volume, saliency=model.saliency_names(work.saliency or False), report=work.report)
    if work.saliency is None or work.saliency:
        return found, found.saliency
    first = sorted(found.probabilities, key=lambda name: -found.probabilities[name])[:MOST_PROBABLE]
    return found, model.predict_volume(volume, saliency=first).saliency


def _place(out: Path, scan: Scan) -> Path:
    return out / PARTS / f"{scan.slug}.json"


def _part(out: Path, scan: Scan, key: str | None = None) -> dict[str, Any] | None:
    """Return the results of a scan; None if there are none, or, with a key, they are of another request."""
    try:
        record = dict(json.loads(_place(out, scan).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return record if key is None or record.get("key") == key else None


def _write(out: Path, scans: list[Scan], unreadable: dict[str, str], model: CTModel, report: bool) -> tuple[str, int]:
    """Write the tables of all scans; return the summary and the number of unreadable scans."""
    rows, reports, embeddings, names = [], [], [], []
    for scan in scans:
        start = [scan.name, scan.study, str(scan.file.url or scan.file.path)]
        if scan.name in unreadable:
            rows.append([*start, "unreadable", unreadable[scan.name], "", *[""] * len(model.findings)])
            continue
        record = _part(out, scan)
        if record is None:
            raise InputError(f"{_place(out, scan)}: disappeared while the tables were written. Repeat the command.")
        values = [f"{record['probabilities'][name]:.6f}" for name in model.findings]
        rows.append([*start, "read", "", record["asked"], *values])
        embeddings.append(np.array(record["embedding"], dtype=np.float32))
        names.append(scan.name)
        reports.append([scan.name, record["report"]])
    header = ["scan", "study_id", "path", "status", "reason", "asked", *model.findings]
    write_text(out / "probabilities.csv", _table(header, rows))
    stacked = np.stack(embeddings) if embeddings else np.zeros(0, dtype=np.float32)
    write_bytes(out / "embeddings.safetensors", save({"embeddings": stacked}, metadata={"scans": json.dumps(names)}))
    if report:
        write_text(out / REPORTS, _table(["scan", "report"], reports))
    told = [
        f"{len(names)} scans read, {len(unreadable)} unreadable; {model.notice}",
        f"results: {out / 'probabilities.csv'}",
    ]
    told += [f"unreadable: {scan.name}: {unreadable[scan.name]}" for scan in scans if scan.name in unreadable]
    return "\n".join(told), len(unreadable)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
