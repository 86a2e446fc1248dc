"""`ctx-distill prepare` killed at any moment loses nothing and doubles nothing; training on it goes as on the scans."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from ctx_distill.commands.main import main
from ctx_distill.data.loading.prepared import PreparedFolder
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.runs.prepare_volumes import preset_volume

KILLS = 20


@pytest.mark.slow
def test_killed_at_twenty_moments(cohort: Path, tmp_path: Path, tiny_preset: Path) -> None:
    command = [sys.executable, "-m", "ctx_distill", "prepare", str(cohort / "ct.csv"), str(tmp_path / "out"),
               "--preset", str(tiny_preset), "--workers", "2"]  # fmt: skip
    draw = random.Random(4)
    standing: dict[Path, int] = {}
    killed_at_work = 0
    for number in range(KILLS):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        before = len(list((tmp_path / "out").rglob("*.json")))
        # waits until this run has written something, so that it is killed at work and not in its imports
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "out").rglob("*.json"))) <= before + (number == 0) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.01))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed_at_work += 1
        process.wait()
        items = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "items").rglob("*.json")}
        assert all(items.get(path) == stamp for path, stamp in standing.items())
        standing = items
    assert killed_at_work >= 5
    assert subprocess.run(command, check=False).returncode == 0
    manifest = read_manifest(cohort / "ct.csv")
    items = list((tmp_path / "out" / "items").rglob("*.json"))
    assert len(items) == len(manifest)
    folder = PreparedFolder.open(tmp_path / "out", *preset_volume(str(tiny_preset)))
    for row in manifest.frame.index:
        assert folder.is_complete(str(manifest.frame.at[row, "image_id"]), manifest.scan_file(int(row)))


@pytest.mark.slow
def test_the_first_fifty_losses_are_those_of_streaming(
    cohort: Path, finished_run: Path, tmp_path: Path, tiny_preset: Path
) -> None:
    assert main(["prepare", str(cohort / "ct.csv"), str(tmp_path / "out"), "--preset", str(tiny_preset)]) == 0
    losses = []
    for name, extra in (
        ("scans", "--data.init_args.volume.stored=int16"),
        ("prepared", f"--data.init_args.prepared={tmp_path / 'out'}"),
    ):
        run = tmp_path / name
        for stage in ("expert", "index"):
            shutil.copytree(finished_run / stage, run / stage)
        arguments = ["distill", "--data", str(cohort), "--run", str(run), "--preset", str(tiny_preset), extra]
        assert main([*arguments, "--trainer.max_epochs=-1", "--trainer.max_steps=50"]) == 0
        table = pd.read_csv(run / "distill" / "logs" / "metrics.csv")
        losses.append(table["train/loss"].dropna().tolist())
    assert len(losses[0]) == 50
    assert losses[0] == losses[1]
