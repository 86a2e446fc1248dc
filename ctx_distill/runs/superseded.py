"""Superseded results of a run: the folders `NAME.before-N` that a stage with other settings left behind."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from ctx_distill.errors import InputError
from ctx_distill.runs.run_folder import BEFORE, lock_run
from ctx_distill.runs.stage_table import STAGES


@dataclass(frozen=True)
class Superseded:
    """One superseded folder.

    Attributes:
        path: the folder.
        size: bytes of its files.
        modified: seconds since the epoch of its newest file.
    """

    path: Path
    size: int
    modified: float


def superseded(run: Path) -> list[Superseded]:
    """Return the superseded folders of a run's stages, ordered by name and number.

    Raises:
        InputError: there is no such folder.
    """
    if not run.is_dir():
        raise InputError(f"{run}: no such run folder; expected one that `ctx-distill all` or a stage wrote.")
    stages = {stage.folder for stage in STAGES.values()}
    matches = [(path, BEFORE.fullmatch(path.name)) for path in run.iterdir() if path.is_dir() and not path.is_symlink()]
    chosen = [(match["folder"], int(match["number"]), path) for path, match in matches if match is not None]
    return [_measure(path) for folder, _, path in sorted(chosen) if folder in stages]


def _measure(folder: Path) -> Superseded:
    facts = [path.lstat() for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    return Superseded(
        folder,
        sum(fact.st_size for fact in facts),
        max((fact.st_mtime for fact in facts), default=folder.stat().st_mtime),
    )


def clean_run(run: Path, *, delete: bool) -> str:
    """List the superseded folders of a run, or delete them.

    Args:
        run: the run folder.
        delete: delete them while holding the lock on the run.

    Returns:
        One line per folder, and the total.

    Raises:
        InputError: no such run; with `delete`, another process uses the run.
    """
    if not delete:
        return _listing(run, superseded(run), "`--delete` deletes them")
    if not run.is_dir():
        superseded(run)  # raises
    with lock_run(run, "ctx-distill clean"):
        folders = superseded(run)
        text = _listing(run, folders, "deleted")
        for item in folders:
            shutil.rmtree(item.path)
    return text


def _listing(run: Path, folders: list[Superseded], note: str) -> str:
    if not folders:
        return f"{run}: no superseded results"
    width = max(len(item.path.name) for item in folders)
    lines = [
        f"{item.path.name:{width}}  {_size(item.size):>9}  {time.strftime('%Y-%m-%d %H:%M', time.localtime(item.modified))}"
        for item in folders
    ]
    count = "1 superseded result" if len(folders) == 1 else f"{len(folders)} superseded results"
    return "\n".join([*lines, f"{run}: {count}, {_size(sum(item.size for item in folders))}; {note}"])


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
