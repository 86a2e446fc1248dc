"""Part a: the tests marked `gpu`; in the rehearsal the same tests with the CPU in the GPU's place."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

from gpu.context import Context, Row
from gpu.follow import follow, lines_of

TITLE = "Tests of what only a GPU does"
COLUMNS = {"outcome": ("", ""), "seconds": ("seconds", ".1f")}
FAILED_TESTS = 1


def run(context: Context) -> Iterator[Row]:
    """Yield a row per test; files of tests run beside each other where pytest-xdist is installed."""
    rows = context.work / f"tests-{context.device}.jsonl"
    rows.unlink(missing_ok=True)
    os.environ |= {"GPU_REPORT_ROWS": str(rows), "CTX_TEST_DEVICE": context.device}
    os.chdir(context.repo)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "gpu.pytest_rows",
        "-p",
        "no:cacheprovider",
        "tests/gpu",
    ]
    if importlib.util.find_spec("xdist"):
        files = len(list((context.repo / "tests" / "gpu").glob("test_*.py")))
        command += ["-n", str(files if context.full else 2), "--dist", "loadfile"]
    if context.only:
        command += ["-k", " or ".join(context.only)]
    yield from follow(command, rows, lines_of, allowed=(0, FAILED_TESTS))
