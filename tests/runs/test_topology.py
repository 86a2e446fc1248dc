"""The trainer's settings from what SLURM says of a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctx_distill.commands.main import main
from ctx_distill.errors import InputError
from ctx_distill.runs.topology import Topology, job_topology, starts_with_others, trainer_settings

# As slurm 22.05 sets them in a step that srun started, and in the shell of the same job.
SHELL = {
    "SLURM_JOB_ID": "7",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "0",
}
STEP = SHELL | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}


def test_outside_of_slurm_the_settings_are_the_users() -> None:
    settings = trainer_settings({"PATH": "/bin"})
    assert (settings.before, settings.after) == ([], [])


def test_a_step_on_cpus() -> None:
    assert job_topology(STEP) == Topology(nodes=2, tasks=2, gpus=0)
    settings = trainer_settings(STEP)
    assert settings.before == ["--trainer.accelerator=cpu"]
    assert settings.after[:2] == ["--trainer.devices=2", "--trainer.num_nodes=2"]
    assert '"auto_requeue": false' in settings.after[2]


def test_a_step_on_gpus() -> None:
    wide = {"SLURM_NNODES": "4", "SLURM_NTASKS": "32", "SLURM_STEP_NUM_TASKS": "32", "SLURM_NTASKS_PER_NODE": "8"}
    step = STEP | wide | {"SLURM_GPUS_ON_NODE": "8"}
    assert job_topology(step) == Topology(nodes=4, tasks=8, gpus=8)
    assert trainer_settings(step).before == ["--trainer.accelerator=gpu"]


@pytest.mark.parametrize(
    "shell",
    [
        SHELL,
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # the shell of salloc, itself a step
        {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"},  # salloc -N 2 without a number of tasks
    ],
)
def test_a_shell_of_several_tasks_is_refused(shell: dict[str, str]) -> None:
    with pytest.raises(InputError, match="srun"):
        trainer_settings(shell)


def test_the_shell_of_a_job_of_one_task_trains_as_outside() -> None:
    one = SHELL | {"SLURM_NNODES": "1", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "8"}
    assert job_topology(one) is None
    settings = trainer_settings(one)
    assert settings.before == []
    assert len(settings.after) == 1
    assert "LightningEnvironment" in settings.after[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"SLURM_NTASKS": "3", "SLURM_STEP_NUM_TASKS": "3"}, "same number of tasks"),
        ({"SLURM_GPUS_ON_NODE": "1"}, "one task per GPU"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(change: dict[str, str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        job_topology(STEP | change)


def test_tasks_without_a_number_a_node_are_refused_as_lightning_does() -> None:
    step = {name: value for name, value in STEP.items() if name != "SLURM_NTASKS_PER_NODE"}
    with pytest.raises(InputError, match="ntasks-per-node"):
        job_topology(step | {"SLURM_NNODES": "1"})


def test_a_stage_in_such_a_shell_ends_with_status_2_and_begins_nothing(
    cohort: Path, tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in SHELL.items():
        monkeypatch.setenv(name, value)
    given = ["--data", str(cohort), "--run", str(tmp_path / "run"), "--preset", str(tiny_preset)]
    assert main(["expert", *given]) == 2
    assert "without srun" in capsys.readouterr().err
    assert not (tmp_path / "run" / "expert").exists()


def test_several_stages_in_one_step_are_refused(
    cohort: Path, tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert main(["all", "--data", str(cohort), "--run", str(tmp_path / "run"), "--preset", str(tiny_preset)]) == 2
    assert "one by one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("started", "arguments", "told"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, ["all"], "one by one"),
        ({"NODE_RANK": "1"}, ["heads", "--trainer.num_nodes=2"], "one by one"),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, ["expert", "--force"], "--force in processes"),
    ],
)
def test_so_are_several_stages_and_forced_ones_in_processes_that_start_together(
    cohort: Path,
    tiny_preset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    started: dict[str, str],
    arguments: list[str],
    told: str,
) -> None:
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    assert main([*arguments, "--data", str(cohort), "--run", str(tmp_path / "run"), "--preset", str(tiny_preset)]) == 2
    assert told in capsys.readouterr().err


def test_the_one_node_of_a_platform_that_numbers_nodes_starts_alone() -> None:
    assert not starts_with_others(1, {"NODE_RANK": "0", "MASTER_ADDR": "10.0.0.4"})
    assert not starts_with_others(1, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    assert not starts_with_others(
        2, {"NODE_RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    )  # by Lightning, on that node


@pytest.mark.full
def test_the_key_of_a_stage_is_the_same_in_a_step_of_one_task(
    cohort: Path,
    finished_run: Path,
    tiny_preset: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = {"SLURM_NNODES": "1", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_STEP_NUM_TASKS": "1"}
    for name, value in (STEP | one).items():
        monkeypatch.setenv(name, value)
    assert main(["distill", "--data", str(cohort), "--run", str(finished_run), "--preset", str(tiny_preset)]) == 0
    assert "distillation: complete in" in capsys.readouterr().out
