"""The job script's own rule: what goes back to the queue, how often, and what the job's status is. SLURM is a fake here."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from ctx_distill.runs.run_options import RunOptions
from ctx_distill.runs.slurm import JobOptions, plan_jobs, script_text

REQUEUED = -9  # the fake SLURM ends the script as the real one does


@dataclass
class Job:
    """A job under a fake SLURM whose srun runs the program once, as task 0 of 1."""

    script: Path
    folder: Path
    restarts: int = 0
    said: str = ""

    def attempt(self, program: str, state: str = "RUNNING") -> int:
        """Run the script once with a program's text; its status, REQUEUED where it went back to the queue."""
        (self.folder / "program").write_text(program)
        environment = os.environ | {
            "PATH": f"{self.folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "STATE": state,
            "SLURM_RESTART_COUNT": str(self.restarts), "FOLDER": str(self.folder),
        }  # fmt: skip
        done = subprocess.run(
            ["bash", str(self.script)], env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        self.said = done.stdout + done.stderr
        self.restarts += done.returncode == REQUEUED
        return done.returncode

    def checkpoint(self) -> str:
        """Program text that writes a new checkpoint."""
        folder = self.folder / "run" / "align" / "checkpoints"
        return f"mkdir -p {folder}; echo x >{folder}/.part; mv {folder}/.part {folder}/last.ckpt; "


@pytest.fixture
def job(cohort: Path, tiny_preset: Path, tmp_path: Path) -> Job:
    tools = {
        "srun": 'while [ "$1" != env ] && [ "$1" != bash ]; do shift; done; exec "$@"',
        "scontrol": 'echo "$@" >>"$FOLDER/scontrol-calls"; [ "$1" = show ] && echo "JobId=7 JobState=$STATE Dependency=(null)"\n'
        '[ "$1" = requeue ] && [ "$STATE" = RUNNING ] && kill -KILL $PPID; exit 0',
        "fake-python": 'echo "$@" >>"$FOLDER/given"; exec bash "$FOLDER/program"',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    run = RunOptions(cohort, tmp_path / "run", str(tiny_preset))
    options = JobOptions(gpus=0, setup="python=(fake-python)")
    (planned,) = plan_jobs("align", run, [], options)
    script = tmp_path / "run" / "slurm" / "align.sbatch"
    script.parent.mkdir(parents=True)
    script.write_text(script_text(planned, run, options))
    return Job(script, tmp_path)


def left(job: Job) -> list[str]:
    return sorted(path.name for path in (job.folder / "run" / "slurm").iterdir() if path.name != "align.sbatch")


def test_a_done_program_ends_the_job_and_leaves_no_record(job: Job) -> None:
    assert job.attempt("exit 0") == 0
    assert left(job) == []


def test_a_failure_without_a_checkpoint_is_the_jobs(job: Job) -> None:
    assert job.attempt("exit 3") == 3
    assert "no checkpoint newer" in job.said


def test_a_failure_is_requeued_three_times_each_with_a_newer_checkpoint(job: Job) -> None:
    statuses = [job.attempt(job.checkpoint() + "exit 3") for _ in range(4)]
    assert statuses == [REQUEUED, REQUEUED, REQUEUED, 3]
    assert "after 3 requeues" in job.said


def test_a_failure_at_the_same_checkpoint_is_not_requeued_again(job: Job) -> None:
    assert job.attempt(job.checkpoint() + "exit 3") == REQUEUED
    assert job.attempt("exit 4") == 4


def test_a_checkpoint_of_before_the_job_does_not_count(job: Job) -> None:
    subprocess.run(["bash", "-c", job.checkpoint()], check=True)
    assert job.attempt("exit 3") == 3


@pytest.mark.parametrize("status", [2, 130])
def test_bad_input_and_an_interruption_are_not_tried_again(job: Job, status: int) -> None:
    assert job.attempt(job.checkpoint() + f"exit {status}") == status


def test_a_stop_is_requeued_without_counting_as_a_failure(job: Job) -> None:
    for _ in range(5):
        assert job.attempt(job.checkpoint() + "exit 75") == REQUEUED
    assert [job.attempt(job.checkpoint() + "exit 3") for _ in range(4)] == [REQUEUED, REQUEUED, REQUEUED, 3]


def test_stops_without_progress_end_some_time(job: Job) -> None:
    assert job.attempt(job.checkpoint() + "exit 75") == REQUEUED
    assert [job.attempt("exit 75") for _ in range(10)] == [REQUEUED] * 9 + [75]


def test_a_program_that_the_signal_ended_before_it_listened_is_requeued(job: Job) -> None:
    assert job.attempt("kill -USR1 $$; sleep 5") in (REQUEUED, 0)
    assert job.attempt("trap - USR1; exit 138") == REQUEUED


@pytest.mark.parametrize("state", ["CANCELLED", "PREEMPTED", "TIMEOUT"])
def test_a_job_that_slurm_is_ending_is_not_requeued(job: Job, state: str) -> None:
    assert job.attempt(job.checkpoint() + "exit 75", state) == 75
    assert job.attempt(job.checkpoint() + "exit 3", state) == 3


def test_signals_are_held_back_until_the_program_listens(job: Job) -> None:
    """The program gets a signal at once, and listens a little later: it lives, and the signal is there."""
    if subprocess.run(["env", "--block-signal=USR1", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this env cannot block signals (coreutils before 8.31)")
    listens = "import signal, os, time; os.kill(os.getpid(), signal.SIGUSR1); time.sleep(.1); got = []\n"
    listens += "signal.signal(signal.SIGUSR1, lambda *_: got.append(1)); signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])\n"
    listens += "raise SystemExit(41 if got else 42)"
    (job.folder / "listens.py").write_text(listens)
    assert job.attempt(f"exec python3 {job.folder}/listens.py") == 41


def test_the_first_status_is_the_steps_and_not_that_of_a_task_cut_off(job: Job) -> None:
    """Task 1 fails with 5; srun then kills task 0 and gives the higher 137."""
    (job.folder / "srun").write_text(
        '#!/bin/bash\nwhile [ "$1" != env ] && [ "$1" != bash ]; do shift; done\n'
        'SLURM_PROCID=1 "$@"; exit 137\n'
    )  # fmt: skip
    assert job.attempt("exit 5") == 5
    assert job.attempt(job.checkpoint() + "exit 75") == REQUEUED


def test_a_setup_that_fails_ends_the_job(job: Job) -> None:
    job.script.write_text(job.script.read_text().replace("python=(fake-python)", "python=(fake-python); false"))
    assert job.attempt("exit 0") == 1
    assert "SETUP ended with status 1" in job.said


def test_the_program_is_given_the_command(job: Job, cohort: Path, tiny_preset: Path) -> None:
    job.attempt("exit 0")
    given = (job.folder / "given").read_text().split()
    assert given == ["-m", "ctx_distill", "align", "--data", str(cohort), "--run", str(job.folder / "run"),
                     "--preset", str(tiny_preset)]  # fmt: skip


@pytest.mark.parametrize(("state", "requeued"), [("COMPLETING Reason=None", 0), ("COMPLETING Reason=TimeLimit", 1)])
@pytest.mark.parametrize("status", [75, 9])
def test_a_terminated_shell_outlives_its_tasks(job: Job, state: str, requeued: int, status: int) -> None:
    """scancel and the time limit signal the batch shell as well: the latter alone is requeued, and both wait for the tasks."""
    (job.folder / "program").write_text(f"sleep 1; touch {job.folder}/over; exit {status}")
    environment = os.environ | {"PATH": f"{job.folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0",
                                "STATE": state, "FOLDER": str(job.folder)}  # fmt: skip
    process = subprocess.Popen(["bash", str(job.script)], env=environment)
    while not (job.folder / "given").exists():
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=30) == status
    assert (job.folder / "over").exists()
    assert (job.folder / "scontrol-calls").read_text().count("requeue 7") == requeued


def test_time_limits_without_progress_end_some_time(job: Job) -> None:
    ends = f"kill -TERM $(cat {job.folder}/shell); sleep 0.2; exit 143"
    job.script.write_text(job.script.read_text().replace("name=align", f"echo $$ >{job.folder}/shell; name=align"))
    for _ in range(11):
        assert job.attempt(ends, "COMPLETING Reason=TimeLimit") == 143
    assert (job.folder / "scontrol-calls").read_text().count("requeue 7") == 10


@pytest.mark.parametrize(
    ("environment", "name_is_at", "route", "expected"),
    [
        ({"SLURM_NNODES": "2"}, "127.0.1.1", "default via 10.0.0.1 dev eth7 proto dhcp", "eth7"),
        ({"SLURM_NNODES": "2"}, "127.0.1.1", "", "none"),
        ({"SLURM_NNODES": "2"}, "10.0.0.5", "default via 10.0.0.1 dev eth7", "none"),
        ({"SLURM_NNODES": "1"}, "127.0.1.1", "default via 10.0.0.1 dev eth7", "none"),
        ({"SLURM_NNODES": "2", "GLOO_SOCKET_IFNAME": "ib0"}, "127.0.1.1", "default via 10.0.0.1 dev eth7", "ib0"),
        ({"SLURM_NNODES": "2", "NCCL_SOCKET_IFNAME": "=lo"}, "10.0.0.5", "", "lo"),
        ({"SLURM_NNODES": "2", "NCCL_SOCKET_IFNAME": "^docker"}, "127.0.1.1", "default dev eth7", "eth7"),
    ],
)
def test_gloo_gets_an_interface_that_other_nodes_reach(
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    name_is_at: str,
    route: str,
    expected: str,
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for tool, text in {"getent": f"{name_is_at} node", "ip": route}.items():
        (job.folder / tool).write_text(f"#!/bin/bash\necho '{text}'\n")
        (job.folder / tool).chmod(0o755)
    assert job.attempt('echo "gloo: ${GLOO_SOCKET_IFNAME:-none}"') == 0
    assert f"gloo: {expected}\n" in job.said
    assert ("so other nodes cannot reach it" in job.said) == (name_is_at.startswith("127") and expected == "none"
                                                             and environment["SLURM_NNODES"] == "2")  # fmt: skip
