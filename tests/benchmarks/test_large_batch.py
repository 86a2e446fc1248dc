"""The benchmark's own measurements, at sizes that take seconds: memory that the chunks and the micro-batches save."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "large_batch.py"

pytestmark = pytest.mark.slow


def measured(what: str, **arguments: Any) -> dict[str, float]:
    """In a process of its own, so that the peak is this measurement's."""
    # The allocator gives each large block back at once: the peak is what was alive, not what fragmentation kept.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--measure", what, json.dumps(arguments)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    result: dict[str, float] = json.loads(printed.splitlines()[-1])
    return result


def test_chunked_logits_need_a_fraction_of_one_matrix_of_logits() -> None:
    def matrix(rows: int) -> float:
        return rows * rows * 4 / 2**20

    assert measured("loss", rows=4096, dim=64, chunk=None)["megabytes"] > 2 * matrix(4096)
    assert measured("loss", rows=16384, dim=64, chunk=128)["megabytes"] < matrix(16384) / 8


def test_a_cached_step_needs_the_memory_of_its_micro_batch() -> None:
    plain = measured("step", rows=64, micro_batch=None)
    few, many = (measured("step", rows=rows, micro_batch=8) for rows in (16, 64))
    assert many["megabytes"] < plain["megabytes"] / 2
    assert many["megabytes"] < 1.5 * few["megabytes"]
    assert many["gradient"] == pytest.approx(plain["gradient"], rel=1e-4)
