"""Every stage gives the same numbers on two ranks as on one: weights, metrics, predictions.

In float64, without dropout and without batch norm (whose statistics are a rank's own on the CPU, where torch has no synchronised
one), with the same global batch. The stages run through the command line, two ranks as two gloo processes; each starts
from what one rank made of the stages before it, so that differences do not add up.

The two ranks compute on a pretended accelerator (`tests/helpers/accelerator.py`), on which a collective refuses tensors of
the host as NCCL does; the numbers stay those of the CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ctx_distill.commands.main import main
from ctx_distill.runs.stage_table import STAGES

ACCELERATOR = Path(__file__).parents[1] / "helpers" / "accelerator.py"

pytestmark = [pytest.mark.slow, pytest.mark.ddp]

DOUBLE = ["--trainer.precision=64-true", "--expert.model.init_args.vision=vit", "--report.model.init_args.dropout=0"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the two ranks have: the frozen expert and the index stay float32, whose sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def upstream(alone: Path, stage: str, run: Path) -> Path:
    names = list(STAGES)
    for name in names[: names.index(stage)]:
        shutil.copytree(alone / STAGES[name].folder, run / STAGES[name].folder)
    return run


def on_two_ranks(stage: str, cohort: Path, run: Path, preset: Path, *more: str) -> None:
    command = [sys.executable, str(ACCELERATOR), stage, "--data", str(cohort), "--run", str(run)]
    command += ["--preset", str(preset), *DOUBLE, *more]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ACCELERATOR.parents[2])},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def same_results(theirs: Path, mine: Path) -> None:
    """Metrics, tables and weights of two stage folders."""
    compare(*(json.loads((folder / "metrics.json").read_text()) for folder in (theirs, mine)), theirs.name)
    for table in ("predictions.csv", "retrieval.csv", "reports.csv", "corrected.csv"):
        if (theirs / table).is_file():
            one, two = pd.read_csv(theirs / table), pd.read_csv(mine / table)
            pd.testing.assert_frame_equal(one, two, rtol=1e-6, atol=2e-6)
    for path in theirs.glob("artefact/*.safetensors"):
        one, two = load_file(path), load_file(mine / "artefact" / path.name)
        assert one.keys() == two.keys()
        for name, value in one.items():
            np.testing.assert_allclose(two[name].numpy(), value.numpy(), rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("stage", list(STAGES))
def test_two_ranks_give_the_numbers_of_one(alone: Path, halved: Path, cohort: Path, tmp_path: Path, stage: str) -> None:
    run = upstream(alone, stage, tmp_path / "run")
    on_two_ranks(stage, cohort, run, halved)
    same_results(alone / STAGES[stage].folder, run / STAGES[stage].folder)


SETTINGS = {
    "beams": (  # once it has learnt a little, this decoder writes one text for all studies; as it begins, it does not
        "report", "--model.init_args.beams=3", "--model.init_args.no_repeat=2", "--model.init_args.min_length=4",
        "--model.init_args.optimizer={class_path: torch.optim.AdamW, init_args: {lr: 1.0e-9}}",
    ),
    "sampling": ("report", "--model.init_args.sampling={temperature: 1.5, top_p: 0.9, seed: 3}"),
    "early stopping": (
        "classifier", "--model.init_args.mode=finetune", "--model.init_args.layer_decay=0.7",
        "--model.init_args.loss.kind=focal", "--model.init_args.patience=1", "--trainer.max_epochs=6",
        "--model.init_args.optimizer={class_path: torch.optim.SGD, init_args: {lr: 2.0}}",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def uneven(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cohort with one `test` study less: its rows do not divide by two, so that the sampler repeats one."""
    folder = tmp_path_factory.mktemp("uneven")
    for name in ("ct.csv", "xray.csv"):
        frame = pd.read_csv(cohort / name, dtype=str, keep_default_na=False)
        frame["root"] = str(cohort)
        frame = frame.drop(index=frame.index[frame["split"] == "test"][-1:])
        frame.to_csv(folder / name, index=False)
    shutil.copy(cohort / "cohort.json", folder)
    assert (pd.read_csv(folder / "ct.csv")["split"] == "test").sum() % 2 == 1
    return folder


@pytest.mark.parametrize("name", list(SETTINGS))
def test_so_do_the_other_ways_to_train_and_to_write(
    alone: Path, halved: Path, uneven: Path, tiny_preset: Path, tmp_path: Path, name: str
) -> None:
    """The weighted loss is the classifier's default, so that the test above has it."""
    frame = pd.read_csv(uneven / "ct.csv")
    stage, *more = SETTINGS[name]
    one, two = (upstream(alone, stage, tmp_path / ranks) for ranks in ("one", "two"))
    assert main([stage, "--data", str(uneven), "--run", str(one), "--preset", str(tiny_preset), *DOUBLE, *more]) == 0
    on_two_ranks(stage, uneven, two, halved, *more)
    mine, theirs = (run / STAGES[stage].folder for run in (two, one))
    same_results(theirs, mine)
    if stage == "report":
        written = pd.read_csv(theirs / "reports.csv", keep_default_na=False)["generated"]
        assert written.nunique() > 1
        assert (
            written.tolist()
            != pd.read_csv(alone / "report" / "reports.csv", keep_default_na=False)["generated"].tolist()
        )
    else:
        steps = [json.loads((folder / "training.json").read_text())["steps"] for folder in (theirs, mine)]
        assert steps[0] == steps[1] < 6 * -(-(frame["split"] == "train").sum() // 8)  # patience ended both alike
