"""Rows out of a program that appends them to a JSON file, or to a file of JSON lines, while it runs."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def rows_of(path: Path) -> Rows:
    """The list `rows` of a JSON file that is written whole."""
    rows: Rows = json.loads(path.read_text()).get("rows", []) if path.is_file() else []
    return rows


def lines_of(path: Path) -> Rows:
    """A row per complete line."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def follow(
    command: list[str], path: Path, read: Callable[[Path], Rows], allowed: tuple[int, ...] = (0,)
) -> Iterator[dict[str, Any]]:
    """Run a program and yield each row of its file, those that are there already first.

    Args:
        command: the program; its output goes where this process's goes.
        path: its file.
        read: gives the rows of the file so far.
        allowed: exit statuses that mean that it ran through.

    Raises:
        RuntimeError: it ended with another status, after all its rows.
    """
    seen = 0
    process = subprocess.Popen(command)
    try:
        while True:
            ended = process.poll() is not None
            rows = read(path)
            yield from rows[seen:]
            seen = len(rows)
            if ended:
                break
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode not in allowed:
        raise RuntimeError(
            f"{Path(command[1]).name if len(command) > 1 else command[0]} ended with status {process.returncode}"
        )
