"""`ctx-distill prepare` at a signal, as SLURM sends it to a job step: to the program and to its workers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from ctx_distill.commands.main import main
from ctx_distill.signals import STOPPED


@pytest.mark.full
def test_it_ends_with_the_status_of_a_stop_and_the_same_command_goes_on(
    cohort: Path, tmp_path: Path, tiny_preset: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Many more scans than can be done before the signal comes: every scan forty times.
    table = pd.read_csv(cohort / "ct.csv", dtype=str)
    shutil.copytree(cohort / "ct", tmp_path / "ct", copy_function=os.link)
    copies = []
    for number in range(40):
        copy = table.copy()
        for name in {"study_id", "patient_id", "image_id"} & set(table.columns):
            copy[name] += f"-{number}"
        copies.append(copy)
    few, many = tmp_path / "few.csv", tmp_path / "many.csv"
    copies[0].to_csv(few, index=False)
    pd.concat(copies).to_csv(many, index=False)
    rest = [str(tmp_path / "out"), "--preset", str(tiny_preset), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ctx_distill", "prepare", str(many), *rest], start_new_session=True
    )
    while not list((tmp_path / "out").rglob("items/**/*.json")) and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGUSR1)
    assert process.wait(timeout=120) == STOPPED
    made = len(list((tmp_path / "out").rglob("items/**/*.json")))
    assert 0 < made < 40 * len(table)
    assert main(["prepare", str(few), *rest]) == 0
    told = capfd.readouterr().out
    assert f", {min(made, len(table))} already there, 0 failed, of {len(table)}" in told
