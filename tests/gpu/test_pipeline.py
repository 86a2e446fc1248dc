"""The whole tiny pipeline on the device in bf16, stopped once and finished; its models agree with the CPU's in float32."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from ctx_distill.runs.stage_table import STAGES
from ctx_distill.signals import STOPPED

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(2400)]
TRAINED = ("expert", "distill", "align", "classifier", "report")
EPOCHS = 3
PROBABILITY = 0.05
"""bf16 keeps 8 bits: each of some 20 layers rounds by up to 0.4 %, so that cosines of unit features are off by up to about
0.01. Logits are at most some 15 times a difference of two cosines, probabilities at most a quarter of that: 0.05."""
FLOAT32 = 0.01
"""Convolutions may take TF32 on a GPU, with 11 bits where bf16 has 8."""


def command(run: Path, cohort: Path, preset: Path, stage: str = "all", *more: str) -> list[str]:
    given = [stage, "--data", str(cohort), "--run", str(run), "--preset", str(preset), *more]
    return [sys.executable, "-m", "ctx_distill", *given]


@pytest.fixture(scope="module")
def preset(bf16_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint before every batch, and an alignment that is long enough to be stopped."""
    layers = yaml.safe_load(bf16_preset.read_text())
    layers.setdefault("classifier", {})
    for stage in TRAINED:
        section = layers.setdefault(stage, {})
        section.setdefault("model", {}).setdefault("init_args", {})["survival"] = {"checkpoint_minutes": 1e-6}
        section.setdefault("trainer", {})["max_epochs"] = 30 if stage == "align" else EPOCHS
    path = tmp_path_factory.mktemp("preset") / "stopped.yaml"
    path.write_text(yaml.safe_dump(layers))
    return path


@pytest.fixture(scope="module")
def run(
    device: torch.device, cohort: Path, preset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, str]:
    """The run folder, and what the stopped and the finishing process printed."""
    run = tmp_path_factory.mktemp("gpu") / "run"
    first = subprocess.Popen(
        command(run, cohort, preset),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    written = run / "align" / "checkpoints" / "last.ckpt"
    end = time.monotonic() + 900
    while not written.exists() and first.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    if first.poll() is None:
        os.kill(first.pid, signal.SIGTERM)
    printed, _ = first.communicate(timeout=300)
    assert written.exists(), printed[-4000:]
    assert first.returncode == STOPPED, printed[-4000:]
    second = subprocess.run(command(run, cohort, preset), text=True, capture_output=True, timeout=900)
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-4000:]
    return run, printed, second.stdout


def test_it_resumed_where_it_was_stopped(run: tuple[Path, str, str]) -> None:
    folder, _, finishing = run
    assert f"resuming from {folder / 'align' / 'checkpoints' / 'last.ckpt'}" in finishing
    for stage in ("expert", "distill"):
        assert finishing.count(f"complete in {folder / STAGES[stage].folder}") == 1
    training = json.loads((folder / "align" / "training.json").read_text())
    curve = pd.read_csv(folder / "align" / "logs" / "metrics.csv")
    assert curve["train/loss"].notna().sum() == 30
    assert training["steps"] % 30 == 0


def test_every_stage_is_complete_and_finite(run: tuple[Path, str, str]) -> None:
    folder = run[0]
    for stage in STAGES.values():
        assert (folder / stage.folder / "metrics.json").is_file(), stage.name
    for stage in TRAINED:
        curve = pd.read_csv(folder / STAGES[stage].folder / "logs" / "metrics.csv")["train/loss"].dropna()
        assert np.isfinite(curve).all(), stage
        assert json.loads((folder / STAGES[stage].folder / "training.json").read_text())["skipped_steps"] == 0, stage
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 <= metrics["retrieval"]["jaccard_at_1"]["value"] <= 1
    assert math.isfinite(metrics["zero_shot"]["macro_auroc"]["value"])
    assert (folder / "index.html").stat().st_size > 10_000


def largest_difference(one: Path, two: Path) -> float:
    tables = [pd.read_csv(path, dtype={"study_id": str}).set_index("study_id").sort_index() for path in (one, two)]
    assert list(tables[0].index) == list(tables[1].index)
    assert list(tables[0].columns) == list(tables[1].columns)
    return float(np.abs(tables[0].to_numpy() - tables[1].to_numpy()).max())


@pytest.mark.parametrize("stage", ["zero-shot"])
def test_predictions_are_the_cpu_s(
    run: tuple[Path, str, str], stage: str, cohort: Path, preset: Path, device: torch.device, tmp_path: Path
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run[0], copied)
    predictions = {"bf16": run[0] / "zero_shot" / "predictions.csv"}
    for name, accelerator in (("device", "gpu" if device.type == "cuda" else "cpu"), ("cpu", "cpu")):
        more = ["--force", f"--trainer.accelerator={accelerator}", "--trainer.precision=32-true"]
        done = subprocess.run(
            command(copied, cohort, preset, stage, *more), text=True, capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        predictions[name] = tmp_path / f"{name}.csv"
        shutil.copyfile(copied / "zero_shot" / "predictions.csv", predictions[name])
    assert largest_difference(predictions["device"], predictions["cpu"]) < FLOAT32
    assert largest_difference(predictions["bf16"], predictions["cpu"]) < PROBABILITY


def test_a_finished_model_predicts_on_the_device_what_it_does_on_the_cpu(
    run: tuple[Path, str, str], cohort: Path, device: torch.device
) -> None:
    from ctx_distill.inference.model import CTModel
    from ctx_distill.inference.parts import open_parts

    scan = cohort / pd.read_csv(cohort / "ct.csv")["image_path"][0]
    found: list[Any] = []
    for place in ("cpu", device):
        model = CTModel(open_parts(run[0])).to(place)
        found.append(model.predict(scan, saliency=[model.findings[0]], report=True))
    cpu, there = found
    assert there.probabilities.keys() == cpu.probabilities.keys()
    for name, value in cpu.probabilities.items():
        assert there.probabilities[name] == pytest.approx(value, abs=FLOAT32), name
    np.testing.assert_allclose(there.embedding, cpu.embedding, atol=FLOAT32)
    name = next(iter(cpu.saliency))
    scale = np.abs(cpu.saliency[name].values).max()
    assert np.abs(there.saliency[name].values - cpu.saliency[name].values).max() <= 0.05 * scale + 1e-6
    assert isinstance(there.report, str)
