"""The run folder: its lock, the completeness of stages, and the files at its top that join the stages."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ctx_distill import __version__
from ctx_distill.errors import InputError
from ctx_distill.files import write_json
from ctx_distill.run_files import (
    CHECKPOINTS,
    METRICS_FILE,
    PREDICTIONS,
    REPORTS,
    REQUEST_FILE,
    RUN_FILE,
    ZERO_SHOT_PREDICTIONS,
)
from ctx_distill.runs.stage_table import STAGES, Stage

PUBLISHED = {
    "zero-shot": (PREDICTIONS, ZERO_SHOT_PREDICTIONS),
    "report": (REPORTS, REPORTS),
}
BEFORE = re.compile(r"(?P<folder>.+)\.before-(?P<number>\d+)")
"""The name of a former result that a stage with another request left behind."""
_HELD = "CTX_DISTILL_LOCK_HELD"


RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK")
"""Each is 0 in rank zero's process: set by torchrun (RANK, LOCAL_RANK, GROUP_RANK: the node's), by srun, and by whoever
starts one process per node for Lightning to start the others there (NODE_RANK)."""


def is_first_process() -> bool:
    """Return whether this process is rank zero of its job, without torch."""
    return all(int(os.environ.get(name) or 0) == 0 for name in RANK_VARIABLES)


@contextmanager
def lock_run(run: Path, command: str) -> Iterator[None]:
    """Lock the run folder for one writer; the kernel releases the lock when the process dies, however it dies.

    Child processes of the holder and other ranks of its job pass.

    Raises:
        InputError: another process holds the lock; the message names it.
    """
    if os.environ.get(_HELD) == str(run.resolve()) or not is_first_process():
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / ".lock")
        holder = run / ".lock.json"
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(_busy(run, holder)) from None
    except OSError as error:
        raise InputError(f"{run}: cannot write here ({error.strerror}). Give another folder with --run.") from error
    try:
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "command": command,
                            "since": time.strftime("%Y-%m-%d %H:%M:%S")})  # fmt: skip
        os.environ[_HELD] = str(run.resolve())
        yield
    finally:
        os.environ.pop(_HELD, None)
        holder.unlink(missing_ok=True)
        lock.release()


def _busy(run: Path, holder: Path) -> str:
    try:
        who = json.loads(holder.read_text())
        name = f"process {who['pid']} on {who['host']} since {who['since']} (`{who['command']}`)"
    except (OSError, ValueError, KeyError):
        name = "another process"
    return f"{run}: in use by {name}. Wait for it to end, end it, or give another folder with --run."


def is_complete(folder: Path, key: str) -> bool:
    """Return whether a stage's folder holds the finished result of exactly this request."""
    request = read_json(folder / REQUEST_FILE)
    return request is not None and request.get("key") == key and (folder / METRICS_FILE).is_file()


def open_stage(folder: Path, key: str, request: dict[str, Any], *, force: bool = False) -> Path | None:
    """Make a stage's folder ready for a request.

    A folder of the same request is kept, so that the stage resumes. A folder of another request is moved to
    `NAME.before-<n>`, so that nothing is lost.

    Args:
        folder: the stage's folder.
        key: the key of the request.
        request: what is recorded with the key.
        force: also move a folder of the same request.

    Returns:
        Where a former result was moved; None if nothing was moved.
    """
    former: Path | None = None
    found = read_json(folder / REQUEST_FILE)
    if folder.exists() and (found is None or found.get("key") != key or force):
        if found is None:
            shutil.rmtree(folder)
        else:
            matches = [BEFORE.fullmatch(path.name) for path in folder.parent.glob(f"{folder.name}.before-*")]
            number = 1 + max((int(match["number"]) for match in matches if match is not None), default=0)
            former = folder.with_name(f"{folder.name}.before-{number}")
            folder.rename(former)
            print(f"{folder}: holds a run of {_difference(found, key)}; moved to {former.name}")
    write_json(folder / REQUEST_FILE, {"key": key, "version": __version__, **request})
    return former


def _difference(found: dict[str, Any], key: str) -> str:
    """Return in what a recorded request differs from this one, for a message."""
    if found.get("key") == key:
        return "the same settings and inputs"
    version = str(found.get("version", "0.1"))
    return "other settings or inputs" if version == __version__ else f"version {version} (this is {__version__})"


def put_back(folder: Path, former: Path | None) -> None:
    """Restore the former result of a stage after a request that failed before it produced anything.

    Args:
        folder: the stage's folder.
        former: what `open_stage` returned.
    """
    if former is not None and not (folder / CHECKPOINTS).exists() and not (folder / METRICS_FILE).exists():
        shutil.rmtree(folder)
        former.rename(folder)
        print(f"{folder}: restored the former result")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON mapping; None if the file is missing or corrupt."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def join_metrics(run: Path) -> dict[str, Any]:
    """Join the metrics of the finished stages in `RUN/metrics.json`, and copy their tables to the run folder."""
    joined: dict[str, Any] = {}
    made = (read_json(run / RUN_FILE) or {}).get("stages", {})
    for stage in STAGES.values():
        folder = run / stage.folder
        metrics = read_json(folder / METRICS_FILE)
        if metrics is None or not _is_current(run, stage, made):
            continue
        joined[stage.metrics_key] = metrics
        if stage.name in PUBLISHED:
            source, target = PUBLISHED[stage.name]
            part = run / f".{target}.part"
            shutil.copyfile(folder / source, part)
            part.replace(run / target)
    write_json(run / METRICS_FILE, joined)
    return joined


def _is_current(run: Path, stage: Stage, made: dict[str, Any]) -> bool:
    """Return whether a stage was made from the artefacts that the run holds now; print a note if it was not."""
    inputs = (read_json(run / stage.folder / REQUEST_FILE) or {}).get("inputs", {})
    for argument, maker in stage.needs:
        own = made.get(STAGES[maker].folder, {}).get("fingerprint")
        outside = str(inputs.get(f"{argument} from", ""))
        if outside != "elsewhere" and own is not None and inputs.get(argument) not in (None, own):
            print(
                f"{run / stage.folder}: made from an earlier {STAGES[maker].title}; excluded from the metrics until it is rerun"
            )
            return False
    return True


def note_stage(run: Path, stage: Stage, **facts: Any) -> None:
    """Add facts of a stage (seconds, fingerprint) to `RUN/run.json`."""
    record = read_json(run / RUN_FILE) or {"created": time.strftime("%Y-%m-%d %H:%M:%S"), "stages": {}}
    record["stages"].setdefault(stage.folder, {}).update(facts)
    write_json(run / RUN_FILE, record)


def note_run(run: Path, **facts: Any) -> None:
    """Add facts of the run (preset, data, expert, volume spec) to `RUN/run.json`."""
    record = read_json(run / RUN_FILE) or {"created": time.strftime("%Y-%m-%d %H:%M:%S"), "stages": {}}
    record.update({name: value for name, value in facts.items() if value is not None})
    write_json(run / RUN_FILE, record)
