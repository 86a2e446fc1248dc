"""Runs the parts, each in a process group of its own and within its own time."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from gpu.context import Context, Row

GRACE = 5.0
"""Seconds between the signal that asks a part to end and the one that ends it."""
POLL = 0.2


def write_json(path: Path, value: Any) -> None:
    """Write a file that is complete whenever it is looked at."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The file's object; an empty one where there is no file."""
    value: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return value


def limits_of(weights: Mapping[str, float], total: float) -> dict[str, float]:
    """Seconds of each part: the whole time, shared in proportion to what each is planned to take.

    Args:
        weights: planned seconds of the parts that are still to run, in their order.
        total: seconds that are left.
    """
    planned = sum(weights.values())
    return {name: total * weight / planned for name, weight in weights.items()}


def run_child(name: str, module_name: str, context: Context, result: Path) -> int:
    """Run a part in this process; its rows are in `result` as they come.

    Args:
        name: of the part.
        module_name: of the module that is the part.
        context: for it.
        result: JSON file: `title`, `state`, `rows`, `targets`, and `error` of a part that failed.

    Returns:
        The exit status.
    """
    earlier: list[Row] = [row for row in read_json(result).get("rows", []) if row.get("name") in context.finished]
    facts: dict[str, Any] = {"part": name, "title": name, "state": "running", "rows": earlier, "targets": []}
    status = 0
    try:
        part = importlib.import_module(module_name)
        facts["title"] = part.TITLE
        write_json(result, facts)
        for row in part.run(context):
            if row["name"] in context.finished:  # a part that cannot skip it has measured it once more
                continue
            facts["rows"].append(row)
            if hasattr(part, "targets"):
                facts["targets"] = [asdict(target) for target in part.targets(facts["rows"])]
            write_json(result, facts)
        facts["state"] = "done"
    except Exception as error:
        traceback.print_exc()
        facts |= {"state": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        status = 1
    write_json(result, facts)
    return status


def descendants(pid: int) -> list[int]:
    """Process ids of the children of a process, their children, and so on (Linux)."""
    found, parents = [], {pid}
    table: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        table.setdefault(int(fields[1]), []).append(int(folder.name))
    while parents:
        children = [child for parent in parents for child in table.get(parent, [])]
        found += children
        parents = set(children)
    return found


def end(process: subprocess.Popen[bytes], grace: float = GRACE) -> None:
    """End a process group: ask, wait, then kill it and what it started outside the group."""
    started = descendants(process.pid)
    _signal(os.killpg, process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    started = list({*started, *descendants(process.pid)})
    _signal(os.killpg, process.pid, signal.SIGKILL)
    for pid in started:
        _signal(os.kill, pid, signal.SIGKILL)
    process.wait()


def _signal(send: Callable[[int, int], None], pid: int, number: int) -> None:
    try:
        send(pid, number)
    except (ProcessLookupError, PermissionError):
        return


class Stopped(BaseException):
    """The run itself was asked to end."""


def supervise(
    command: list[str], variables: dict[str, str], result: Path, log: Path, limit: float, show: Callable[[Row], None]
) -> dict[str, Any]:
    """Run a part's process until it ends or its time is over.

    Args:
        command: that writes `result`.
        variables: its environment.
        result: see `run_child`.
        log: its output is appended there.
        limit: seconds.
        show: is given each new row.

    Returns:
        What is in `result` at the end, `state` among it: `done`, `failed`, or `stopped` where the time was over.

    Raises:
        Stopped: this process was asked to end; the part has been ended, and `result` says so.
    """
    began = time.monotonic()
    shown = len(read_json(result).get("rows", []))
    ended = None
    with log.open("ab") as out:
        process = subprocess.Popen(command, env=variables, stdout=out, stderr=out, start_new_session=True)
        previous = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while process.poll() is None and time.monotonic() - began < limit:
                time.sleep(POLL)
                shown = _show(result, shown, show)
            ended = process.poll()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            end(process)  # also what a part that is done has left running
            seconds = time.monotonic() - began
            facts = _closed(result, ended, seconds, limit)
            facts |= {"seconds": round(seconds, 1), "limit": round(limit, 1)}
            write_json(result, facts)
    _show(result, shown, show)
    return facts


def _closed(result: Path, ended: int | None, seconds: float, limit: float) -> dict[str, Any]:
    facts = read_json(result) or {"rows": [], "targets": []}
    if facts.get("state") not in ("done", "failed"):
        why = f"its time was over ({limit:.0f} s)" if seconds >= limit else "the report was stopped"
        if ended is None:
            facts |= {"state": "stopped", "error": f"{why}; the rows that it has are complete"}
        else:
            facts |= {"state": "failed", "error": f"its process ended with status {ended}; see log.txt"}
    return facts


def _show(result: Path, shown: int, show: Callable[[Row], None]) -> int:
    rows = read_json(result).get("rows", [])
    for row in rows[shown:]:
        show(row)
    return len(rows)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(f"signal {number}")


def child_command(script: Path, name: str, module_name: str, context: Context, result: Path) -> list[str]:
    """The command of `run_child`."""
    plain = {
        **asdict(context),
        "work": str(context.work),
        "repo": str(context.repo),
        "finished": sorted(context.finished),
    }
    words = {"part": name, "module": module_name, "context": plain, "result": str(result)}
    return [sys.executable, str(script), "--child", json.dumps(words)]


def context_of(plain: dict[str, Any]) -> Context:
    """The context of `child_command`."""
    paths = {"work": Path(plain["work"]), "repo": Path(plain["repo"])}
    sets = {"finished": frozenset(plain["finished"]), "only": tuple(plain["only"])}
    return Context(**{**plain, **paths, **sets})
