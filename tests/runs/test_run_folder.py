"""The lock on a run folder, completeness, and what is set aside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ctx_distill.errors import InputError
from ctx_distill.runs.run_folder import is_complete, is_first_process, join_metrics, lock_run, open_stage
from ctx_distill.runs.stage_table import STAGES

HOLD = """
import sys, time
from pathlib import Path
from ctx_distill.runs.run_folder import lock_run
with lock_run(Path(sys.argv[1]), "ctx-distill distill"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_told_who_holds_the_run_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match=f"in use by process {holder.pid} .*ctx-distill distill"),
            lock_run(tmp_path, "x"),
        ):
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with lock_run(tmp_path, "x"):
        assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock.json").exists()


def test_children_of_the_holder_pass(tmp_path: Path) -> None:
    with lock_run(tmp_path, "parent"), lock_run(tmp_path, "child"):
        pass


def test_a_run_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write here"), lock_run(tmp_path / "file" / "run", "x"):
        pass


def test_a_stage_is_complete_only_with_its_metrics_and_its_own_key(tmp_path: Path) -> None:
    folder = tmp_path / "distill"
    open_stage(folder, "k1", {})
    assert not is_complete(folder, "k1")
    (folder / "metrics.json").write_text("{}")
    assert is_complete(folder, "k1")
    assert not is_complete(folder, "k2")


def test_another_request_sets_the_old_result_aside_and_the_same_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "distill"
    open_stage(folder, "k1", {})
    (folder / "half").write_text("work")
    open_stage(folder, "k1", {})
    assert (folder / "half").read_text() == "work"
    open_stage(folder, "k2", {})
    assert not (folder / "half").exists()
    assert (tmp_path / "distill.before-1" / "half").read_text() == "work"


def test_metrics_are_joined_under_the_contract_s_keys(tmp_path: Path) -> None:
    for stage in STAGES.values():
        folder = tmp_path / stage.folder
        open_stage(folder, "k", {})
        (folder / "metrics.json").write_text(json.dumps({"of": stage.name}))
        for table in ("predictions.csv", "reports.csv"):
            (folder / table).write_text(f"study_id,{stage.name}\n")
    joined = join_metrics(tmp_path)
    assert list(joined) == ["expert", "retrieval", "distillation", "alignment", "zero_shot", "classifier", "report"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == joined
    assert (tmp_path / "zero_shot_predictions.csv").read_text() == "study_id,zero-shot\n"
    assert (tmp_path / "reports.csv").read_text() == "study_id,report\n"


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("started", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, False),  # by Lightning, for the second device
        ({"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}, True),
        ({"NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1"}, False),  # by hand on the second node
        ({"GROUP_RANK": "1", "MASTER_ADDR": "127.0.0.1"}, False),
        (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),
        (TORCHRUN | {"RANK": "2", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),
    ],
)
def test_the_first_process_is_the_one_that_lightning_gives_rank_zero(
    monkeypatch: pytest.MonkeyPatch, started: dict[str, str], first: bool
) -> None:
    import lightning as L

    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, num_nodes=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    assert is_first_process() is trainer.is_global_zero is first
