"""Every stage, killed with its worker processes and finished, leaves what an undisturbed run leaves, to the bit."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slow
SEED = 7


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fault_tolerance_harness", Path(__file__).with_name("harness.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules["fault_tolerance_harness"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runner(harness: ModuleType, cohort: Path, tiny_preset: Path) -> Iterator[Any]:
    runner = harness.Runner(cohort, tiny_preset, workers=1)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def undisturbed(harness: ModuleType, runner: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    for stage in harness.FOLDERS:
        runner.finish(stage, run)
    return run


def written(path: Path) -> int:
    """When, in ns; 0 where it is not, as the last checkpoint is for a moment between two renames."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


STAGES = ["expert", "index", "distill", "align", "zero-shot", "classifier", "report"]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_finished_is_bit_identical(
    harness: ModuleType, runner: Any, undisturbed: Path, tmp_path: Path, stage: str
) -> None:
    """Three kills from a fixed seed: after some work, inside a checkpoint write, and after some work again."""
    draw = random.Random(f"{SEED} {stage}")
    run = harness.with_upstream(undisturbed, stage, tmp_path / "run")
    folder = run / harness.FOLDERS[stage]
    begun = folder / ("checkpoints/last.ckpt" if stage in harness.TRAINED else "layers.yaml")

    def kill_after(seconds: float) -> bool:
        process = runner.start(stage, run)
        before = written(begun)
        end: list[float] = []

        def moment() -> bool:
            if not end and written(begun) not in (0, before):
                end.append(time.monotonic() + seconds)
            return bool(end) and time.monotonic() >= end[0]

        killed = runner.kill_when(process, moment)
        runner.wait(process)
        return bool(killed)

    assert kill_after(draw.uniform(0, 0.05))
    if stage in harness.TRAINED:
        for _ in range(20):
            process = runner.start(stage, run)
            if runner.kill_in_write(process, run, stage, 1):
                break
            runner.wait(process)  # it got to its end: the writes are short
            shutil.rmtree(run)
            harness.with_upstream(undisturbed, stage, run)
        assert runner.wait(process) == 128 + signal.SIGKILL
        kill_after(draw.uniform(0, 0.2))
    runner.finish(stage, run)
    wanted, found = harness.fingerprints(undisturbed, stage), harness.fingerprints(run, stage)
    assert len(wanted) >= 2
    assert found == wanted
    assert not list(folder.glob("checkpoints/.*"))
    if stage in harness.TRAINED:
        assert "resuming from" in (run / f"{stage}.log").read_text()


@pytest.mark.parametrize(
    ("stage", "number", "status", "word"),
    [("distill", signal.SIGUSR1, 75, "stopped ("), ("report", signal.SIGINT, 130, "interrupted; ")],
)
def test_a_signal_in_training_is_told_by_the_status_and_the_run_goes_on_exactly(
    harness: ModuleType, runner: Any, undisturbed: Path, tmp_path: Path, stage: str, number: int, status: int, word: str
) -> None:
    run = harness.with_upstream(undisturbed, stage, tmp_path / "run")
    process = runner.start(stage, run)
    last = run / stage / "checkpoints" / "last.ckpt"
    while not last.exists():
        assert not runner.ended(process)
        time.sleep(0.001)
    os.kill(process, number)
    assert runner.wait(process) == status
    log = (run / f"{stage}.log").read_text()
    assert word in log
    assert "repeat the command to resume" in log
    assert not (run / stage / "metrics.json").exists()
    runner.finish(stage, run)
    assert harness.fingerprints(run, stage) == harness.fingerprints(undisturbed, stage)


def test_a_torn_last_checkpoint_gives_way_to_the_one_before(
    harness: ModuleType, runner: Any, undisturbed: Path, tmp_path: Path
) -> None:
    run = harness.with_upstream(undisturbed, "align", tmp_path / "run")
    process = runner.start("align", run)
    previous = run / "align" / "checkpoints" / "previous.ckpt"
    assert runner.kill_when(process, previous.exists)
    runner.wait(process)
    last = previous.with_name("last.ckpt")
    if not last.exists():  # killed between the two renames
        last.write_bytes(previous.read_bytes())
    last.write_bytes(last.read_bytes()[:-1000])
    runner.finish("align", run)
    log = (run / "align.log").read_text()
    assert f"{last}: not readable" in log
    assert f"resuming from {previous}" in log
    assert harness.fingerprints(run, "align") == harness.fingerprints(undisturbed, "align")


def test_a_full_disk_is_said_and_the_run_goes_on_once_there_is_room(
    harness: ModuleType, runner: Any, undisturbed: Path, tmp_path: Path
) -> None:
    """The room for a file is limited by the kernel; a checkpoint does not fit, everything smaller does."""
    run = harness.with_upstream(undisturbed, "distill", tmp_path / "run")
    command = [sys.executable, "-m", "ctx_distill", *runner.arguments("distill", run)]
    size = (undisturbed / "distill" / "checkpoints" / "last.ckpt").stat().st_size
    limited = f"ulimit -f {size // 1024 // 2}; exec {shlex.join(command)}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", limited], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert re.search(r"last\.ckpt: the checkpoint of step \d+ cannot be written \(File too large\)", done.stderr)
    assert not list((run / "distill" / "checkpoints").glob(".*"))
    runner.finish("distill", run)
    assert harness.fingerprints(run, "distill") == harness.fingerprints(undisturbed, "distill")


def test_a_checkpoint_of_another_run_is_refused_and_stays(
    harness: ModuleType, runner: Any, undisturbed: Path, tmp_path: Path
) -> None:
    run = harness.with_upstream(undisturbed, "align", tmp_path / "run")
    process = runner.start("align", run)
    last = run / "align" / "checkpoints" / "last.ckpt"
    assert runner.kill_when(process, last.exists)
    runner.wait(process)
    foreign = (undisturbed / "distill" / "checkpoints" / "last.ckpt").read_bytes()
    last.write_bytes(foreign)
    assert runner.wait(runner.start("align", run)) == 2
    log = (run / "align.log").read_text()
    assert "a checkpoint of stage DistillationTask, but this run is of stage AlignmentTask" in log
    assert last.read_bytes() == foreign
