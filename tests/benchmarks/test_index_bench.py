"""The index benchmark on few rows: its table is whole, and its recall is what a search by hand gives."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "index.py"


@pytest.mark.full
def test_every_row_is_written(tmp_path: Path) -> None:
    out = tmp_path / "index.json"
    command = [sys.executable, str(SCRIPT), "--rows", "3000", "--repeats", "1", "--threads", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    table = json.loads(out.read_text())
    assert [row["kind"] for row in table["rows"]] == ["exact", "ivf", "hnsw"]
    assert len(done.stdout.splitlines()) == 5
    by = {row["kind"]: row for row in table["rows"]}
    assert by["exact"]["recall_at_1"] == 1.0
    assert all(0.5 < row["recall_at_1"] <= 1.0 for row in table["rows"])
    keys = 3000 * 512 * 4 / 1e6
    assert abs(by["exact"]["file_mb"] - keys) < 0.1
    assert by["hnsw"]["file_mb"] > by["exact"]["file_mb"]
    assert not list(tmp_path.glob("*.partial"))


def test_keys_are_unit_rows_and_queries_lie_near_them() -> None:
    spec = importlib.util.spec_from_file_location("bench_index", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    keys, queries = module.keys_and_queries(500)
    np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1, rtol=1e-5)
    similarity = queries @ keys.T
    assert (similarity.max(axis=1) > 0.8).all()
    again, _ = module.keys_and_queries(500)
    np.testing.assert_array_equal(keys, again)
