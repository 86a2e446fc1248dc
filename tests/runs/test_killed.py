"""A run that is killed with SIGKILL, wherever it is, is finished by the same command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def start(cohort: Path, run: Path, preset: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ctx_distill", "all", "--data", str(cohort), "--run", str(run)]
    return subprocess.Popen(
        [*command, "--preset", str(preset)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.005)


def test_killed_at_each_of_several_moments_and_then_finished(
    finished_run: Path, cohort: Path, tiny_preset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    moments = ["expert/checkpoints/last.ckpt", "index/request.json", "distill/artefact", "align/checkpoints/last.ckpt",
               "report/request.json"]  # fmt: skip
    for moment in moments:
        process = start(cohort, run, tiny_preset)
        wait_for(run / moment, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (run / "report" / "metrics.json").exists()
    process = start(cohort, run, tiny_preset)
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0
    assert printed.count("complete in") >= 4
    metrics, undisturbed = (json.loads((root / "metrics.json").read_text()) for root in (run, finished_run))
    assert set(metrics) == set(undisturbed)
    assert metrics["retrieval"]["pool"] == undisturbed["retrieval"]["pool"]
    assert (run / "index.html").is_file()
    leftovers = [path.name for path in run.glob("*/.*") if path.is_dir()]
    assert not leftovers
