"""A pytest plugin (`-p gpu.pytest_rows`): one line of JSON per test, in the file that GPU_REPORT_ROWS names, as it ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    """Add the test's row once its call is over, or once its set-up failed or skipped it."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # its controller gets the same report
        return
    if not (report.when == "call" or (report.when == "setup" and report.outcome != "passed")):
        return
    row: dict[str, Any] = {
        "name": report.nodeid.removeprefix("tests/"),
        "outcome": report.outcome,
        "seconds": report.duration,
    }
    if report.outcome == "skipped":
        row["skipped"] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)[:300]
    if report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        row["error"] = " ".join(str(crash.message if crash else report.longrepr).split())[:400]
    with Path(os.environ["GPU_REPORT_ROWS"]).open("a") as out:
        out.write(json.dumps(row) + "\n")
