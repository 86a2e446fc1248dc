"""Every stage gives the same numbers on two ranks as on one: weights, metrics, predictions.

In float64, without dropout and without batch norm (whose statistics are a rank's own on the CPU, where torch has no synchronised
one), with the same global batch. The stages run through the command line, two ranks as two gloo processes; each starts
from what one rank made of the stages before it, so that differences do not add up.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

from ctx_distill.cli import main
from ctx_distill.pipeline.plan import STAGES

pytestmark = [pytest.mark.slow, pytest.mark.ddp]

DOUBLE = ["--trainer.precision=64-true", "--expert.model.init_args.vision=vit", "--report.model.init_args.dropout=0"]


@pytest.fixture(scope="module")
def alone(cohort: Path, tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    assert main(["all", "--data", str(cohort), "--run", str(run), "--preset", str(tiny_preset), *DOUBLE]) == 0
    return run


@pytest.fixture(scope="module")
def halved(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preset with two ranks and half the batch for each."""
    preset = yaml.safe_load(tiny_preset.read_text())
    preset["all"]["trainer"] |= {"devices": 2, "strategy": "ddp_find_unused_parameters_true"}
    for group in ("ct", "xray"):
        for name in ("batch_size", "eval_batch_size"):
            preset[group]["data"]["init_args"][name] //= 2
    path = tmp_path_factory.mktemp("preset") / "halved.yaml"
    path.write_text(yaml.safe_dump(preset))
    return path


def compare(one: Any, two: Any, where: str) -> None:
    """Numbers within 1e-6, everything else equal."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for name in one.keys() - {"timing"}:
            compare(one[name], two[name], f"{where}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(two), where
        for place, (left, right) in enumerate(zip(one, two, strict=True)):
            compare(left, right, f"{where}[{place}]")
    elif isinstance(one, float):
        assert two == pytest.approx(one, rel=1e-6, abs=1e-6), where
    else:
        assert one == two, where


@pytest.mark.parametrize("stage", list(STAGES))
def test_two_ranks_give_the_numbers_of_one(alone: Path, halved: Path, cohort: Path, tmp_path: Path, stage: str) -> None:
    run = tmp_path / "run"
    names = list(STAGES)
    for name in names[: names.index(stage)]:
        shutil.copytree(alone / STAGES[name].folder, run / STAGES[name].folder)
    command = [sys.executable, "-m", "ctx_distill.cli", stage, "--data", str(cohort), "--run", str(run)]
    command += ["--preset", str(halved), *DOUBLE]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    mine, theirs = (root / STAGES[stage].folder for root in (run, alone))
    compare(*(json.loads((folder / "metrics.json").read_text()) for folder in (theirs, mine)), stage)
    for table in ("predictions.csv", "retrieval.csv", "reports.csv", "corrected.csv"):
        if (theirs / table).is_file():
            one, two = pd.read_csv(theirs / table), pd.read_csv(mine / table)
            pd.testing.assert_frame_equal(one, two, rtol=1e-6, atol=2e-6)
    for path in theirs.glob("artefact/*.safetensors"):
        one, two = load_file(path), load_file(mine / "artefact" / path.name)
        assert one.keys() == two.keys()
        for name, value in one.items():
            np.testing.assert_allclose(two[name].numpy(), value.numpy(), rtol=0, atol=1e-6, err_msg=name)
