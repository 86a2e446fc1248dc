"""Part a: the tests marked `gpu`; without a GPU those of them that a pretended device can take, and the skipped by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from gpu.context import Context, Row
from gpu.follow import follow, lines_of

TITLE = "Tests of what only a GPU does"
COLUMNS = {"outcome": ("", ""), "seconds": ("seconds", ".1f")}
FAILED_TESTS, NO_TESTS = 1, 5


def run(context: Context) -> Iterator[Row]:
    """Yield a row per test."""
    rows = context.work / f"tests-{context.device}.jsonl"
    rows.unlink(missing_ok=True)
    os.environ["GPU_REPORT_ROWS"] = str(rows)
    where = ["tests/gpu"] if context.device == "cuda" else ["tests/gpu", "-m", "gpu or not gpu"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu.pytest_rows", "-p", "no:cacheprovider", "--rootdir", str(context.repo),
               *where, "--timeout", str(max(30, int(context.left() / 2)))]  # fmt: skip
    if context.device == "cuda":
        command += ["-m", "gpu"]
    if context.only:
        command += ["-k", " or ".join(context.only)]
    os.chdir(context.repo)
    yield from follow(command, rows, lines_of, allowed=(0, FAILED_TESTS, NO_TESTS))
