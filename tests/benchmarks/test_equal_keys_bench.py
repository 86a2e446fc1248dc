"""The benchmark of repeated keys on few rows: every case is measured, and set beside the pool without repeats."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "equal_keys.py"


@pytest.mark.full
def test_every_case_is_written(tmp_path: Path) -> None:
    out = tmp_path / "equal.json"
    command = [sys.executable, str(SCRIPT), "--rows", "2000", "--repeats", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    table = json.loads(out.read_text())["table"]
    assert [row["repeats"] for row in table] == [
        "none", "100 equal", "1,000 equal", "100 in the last bits", "1,000 in the last bits",
        "1,000 equal, no table", "1,000 in the last bits, no table",
    ]  # fmt: skip
    assert table[0]["ratio"] == [1.0, 1.0, 1.0]
    assert all(ms > 0 for row in table for ms in row["cpu_ms"])
    assert len(done.stdout.splitlines()) == 3 + len(table)
