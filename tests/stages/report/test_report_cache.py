"""The report stage under any limit of its cache: the same bits, also when it is stopped; the stage stays complete."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ctx_distill.commands.main import main
from ctx_distill.signals import STOPPED
from ctx_distill.stages.report.task import ReportTask

pytestmark = pytest.mark.full
TIERS = {
    "memory": ["--model.init_args.cache.memory_gb=1", "--model.init_args.cache.disk_gb=0"],
    "disk": ["--model.init_args.cache={memory_gb: 0, disk_gb: 1}"],
    "recomputed": ["--report.model.init_args.cache.memory_gb=0", "--report.model.init_args.cache.disk_gb=0"],
}


def same_results(one: Path, two: Path) -> None:
    first, second = (load_file(run / "report" / "artefact" / "model.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for name in ("reports.csv", "metrics.json"):
        assert (one / "report" / name).read_bytes() == (two / "report" / name).read_bytes()


@pytest.fixture
def run_report(
    finished_run: Path, cohort: Path, tiny_preset: Path, tmp_path: Path
) -> Callable[[str, list[str]], tuple[Path, Callable[[], int]]]:
    """A run folder with all that the report stage needs, and what runs the stage in it."""

    def prepare(name: str, arguments: list[str]) -> tuple[Path, Callable[[], int]]:
        run = tmp_path / name
        shutil.copytree(finished_run / "align", run / "align")
        shutil.copy(finished_run / "run.json", run / "run.json")
        command = ["report", "--data", str(cohort), "--run", str(run), "--preset", str(tiny_preset)]
        return run, lambda: main([*command, "--trainer.max_epochs=3", *arguments])

    return prepare


def test_memory_disk_and_recomputing_end_with_the_same_bits(
    run_report: Callable[[str, list[str]], tuple[Path, Callable[[], int]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoded: list[int] = []
    real = ReportTask._frozen

    def counted(self: Any, volume: Tensor) -> Tensor:
        encoded.append(len(volume))
        return real(self, volume)

    monkeypatch.setattr(ReportTask, "_frozen", counted)
    runs, calls = {}, {}
    for tier, arguments in TIERS.items():
        runs[tier], start = run_report(tier, arguments)
        encoded.clear()
        assert start() == 0
        assert set(encoded) == {1}  # one at a time: a batch would give other last bits
        calls[tier] = len(encoded)
        printed = capsys.readouterr().out
        assert printed.count("report: tokens of CT volumes: ") == (tier != "memory")
        assert not list((runs[tier] / "report").glob("row-features-*"))
        if tier != "memory":
            same_results(runs["memory"], runs[tier])
    # The file has places for `train` and `val` alone: the `test` rows are encoded for both predictions of the stage.
    held_out = len(pd.read_csv(runs["disk"] / "report" / "reports.csv"))
    assert calls["disk"] == calls["memory"] + held_out < calls["recomputed"]

    encoded.clear()  # the limits change no result: the stage stays complete under others
    run, start = run_report("again", TIERS["disk"])
    shutil.rmtree(run)
    runs["memory"].rename(run)
    assert start() == 0
    assert not encoded


def test_stopped_and_resumed_under_other_limits(
    run_report: Callable[[str, list[str]], tuple[Path, Callable[[], int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, start = run_report("whole", TIERS["memory"])
    assert start() == 0
    stopped, start = run_report("stopped", TIERS["disk"])
    steps: list[int] = []
    real = ReportTask.training_step

    def counted(self: Any, batch: Any, batch_idx: int) -> Tensor:
        steps.append(batch_idx)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ReportTask, "training_step", counted)
        assert start() == STOPPED
    assert len(steps) == 3
    _, resume = run_report("resumed", TIERS["recomputed"])
    shutil.rmtree(stopped.parent / "resumed")
    stopped.rename(stopped.parent / "resumed")
    assert resume() == 0
    same_results(whole, stopped.parent / "resumed")
