"""The parts of the GPU report that rehearse on a CPU: every row is written as it ends, and a limit loses only the rest."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ctx_distill.ablation.plan import CORE, read_plan, selection_jobs
from ctx_distill.runs.stage_table import stages_folder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, out: Path, *more: str) -> tuple[int, str, dict[str, Any]]:
    command = [sys.executable, str(BENCHMARKS / script), "--scale", "small", "--out", str(out), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert out.is_file(), done.stderr[-3000:]
    return done.returncode, done.stdout, json.loads(out.read_text())


@pytest.mark.full
def test_the_index_is_measured_on_both_sides(tmp_path: Path) -> None:
    code, _, result = run("faiss_gpu.py", tmp_path / "out.json", "--device", "cpu", "--threads", "1")
    assert code == 0
    assert result["complete"]
    assert len(result["rows"]) == 8
    for row in result["rows"][1::2]:
        assert row["same_neighbours"] == 1.0
        assert row["largest_difference"] == 0.0
    assert all(row["recall_at_1"] == 1.0 for row in result["rows"] if row["kind"] == "exact")
    assert all(row["ms_1_min"] <= row["ms_1"] <= row["ms_1_max"] for row in result["rows"])


@pytest.mark.full
def test_after_the_limit_no_row_is_begun(tmp_path: Path) -> None:
    code, _, result = run("faiss_gpu.py", tmp_path / "out.json", "--device", "cpu", "--limit", "0")
    assert code == 0
    assert result["rows"] == []
    assert not result["complete"]


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("script", ["faiss_gpu.py", "long_training.py"])
def test_without_a_gpu_it_says_so(script: str, tmp_path: Path) -> None:
    code, printed, result = run(script, tmp_path / "out.json")
    assert code == 1
    assert result["error"]
    assert "not" in printed.splitlines()[-1]
    assert result["rows"] == []


def test_the_plan_of_long_training_has_the_arms_that_it_is_for() -> None:
    plan = read_plan(stages_folder() / "ablation_long.yaml")
    core = plan.regimes[CORE]
    assert (core.pairs, plan.steps) == (1200, 2000)
    assert core.arms[:3] == ("infonce", "scratch-retrieved", "scratch-shuffled")
    assert {"scratch-projection", "text-frozen", "pair-relation", "full", "supervised"} < set(core.arms)
    for name in core.arms:
        if name.startswith("scratch-"):
            assert plan.arms[name].stages["align"]["model"]["init_args"]["text"]["tower"] == "scratch"
            assert "distill" in plan.arms[name].stages
    assert plan.arms["scratch-shuffled"].stages["distill"]["model"]["init_args"]["neighbours"]["control"] == "shuffled"
    assert all(job.select for job in selection_jobs(plan, core.arms))


@pytest.mark.slow
def test_long_training_writes_each_arm(tmp_path: Path) -> None:
    more = ["--device", "cpu", "--run", str(tmp_path / "run"), "--workers", "2"]
    code, _, result = run("long_training.py", tmp_path / "out.json", *more, "--arms", "infonce", "scratch-retrieved")
    assert code == 0, result
    assert result["complete"]
    assert {row["arm"] for row in result["rows"]} == {"infonce", "scratch-retrieved"}
    for row in result["rows"]:
        assert row["scored_on"] == "val"
        assert row["interval"]["low"] <= row["macro_auroc"] <= row["interval"]["high"] + 1e-9
    again, printed, same = run("long_training.py", tmp_path / "out.json", *more, "--arms", "infonce")
    assert again == 0
    assert [row["arm"] for row in same["rows"]] == ["infonce"]
    assert "macro AUROC" not in printed


@pytest.mark.slow
def test_a_killed_long_training_leaves_no_process(tmp_path: Path) -> None:
    """A time limit from outside kills the script alone; a worker that stayed would hold the GPU."""
    command = [sys.executable, str(BENCHMARKS / "long_training.py"), "--scale", "small", "--device", "cpu"]
    script = subprocess.Popen([*command, "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out.json")])
    group = psutil.Process(script.pid)
    end = time.monotonic() + 400
    while not (tmp_path / "run" / "small" / "experts").is_dir():
        assert script.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    workers = group.children(recursive=True)
    script.kill()
    script.wait()
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert workers
    assert not alive, f"{len(gone)} ended"
