"""A training that would make no optimizer step is refused, on every rank alike, instead of ending well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from ctx_distill.commands.main import main


def one_row(cohort: Path, folder: Path) -> Path:
    """The cohort with one X-ray in split train."""
    folder.mkdir()
    for name in ("ct", "xray"):
        table = pd.read_csv(cohort / f"{name}.csv", dtype=str, keep_default_na=False).assign(root=str(cohort))
        if name == "xray":
            rest = table[table["split"] != "train"]
            table = pd.concat([table[table["split"] == "train"][:1], rest])
        table.to_csv(folder / f"{name}.csv", index=False)
    return folder


@pytest.mark.ddp
def test_one_row_on_two_ranks(cohort: Path, tiny_preset: Path, tmp_path: Path) -> None:
    data = one_row(cohort, tmp_path / "data")
    command = [sys.executable, "-m", "ctx_distill", "expert", "--data", str(data), "--run", str(tmp_path / "run")]
    command += [
        "--preset",
        str(tiny_preset),
        "--trainer.devices=2",
        "--trainer.strategy=ddp_find_unused_parameters_true",
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "1 training rows on 2 ranks are fewer than one row per rank" in done.stdout + done.stderr
    assert not (tmp_path / "run" / "expert" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("limit_train_batches=0", "trainer.limit_train_batches is 0"),
        ("limit_train_batches=0.01", "of which trainer.limit_train_batches=0.01 uses none"),
        ("max_epochs=0", "trainer.max_epochs is 0"),
        ("max_steps=0", "trainer.max_steps is 0"),
    ],
)
def test_limits_that_leave_no_batch(
    cohort: Path,
    tiny_preset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    message: str,
) -> None:
    arguments = ["--data", str(cohort), "--run", str(tmp_path), "--preset", str(tiny_preset), f"--trainer.{setting}"]
    assert main(["expert", *arguments]) == 2
    assert message in capsys.readouterr().err
