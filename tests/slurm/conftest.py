"""A cluster of two nodes for the tests marked `slurm`, and what they ask of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MAKE = ("make", "--no-print-directory", "-C", str(ROOT))


class Cluster:
    """A running SLURM of two nodes."""

    def __init__(self, folder: Path) -> None:
        # The jobs find their tools, and the cluster, as a login shell of the cluster would.
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "PYTEST_", "MAKE", "MFLAGS"))
        } | {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def call(self, *command: str, check: bool = True) -> str:
        """A command's output; its errors are the test's."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise AssertionError(f"{command}: status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout + done.stderr

    def make(self, target: str, **variables: object) -> dict[str, str]:
        """Submit with `make TARGET`; the jobs' numbers by name."""
        printed = self.call(*MAKE, target, *(f"{name}={value}" for name, value in variables.items()))
        return dict(re.findall(r"^([a-z-]+): job (\d+)$", printed, re.MULTILINE))

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job: JobState, ExitCode, Restarts and so on."""
        line = self.call("scontrol", "show", "job", "-o", number).splitlines()[0]
        return dict(re.findall(r"(\w+)=(\S*)", line))

    def states(self, jobs: dict[str, str]) -> dict[str, str]:
        """The states of jobs by name."""
        return {name: self.job(number)["JobState"] for name, number in jobs.items()}

    def wait(self, what: str, holds: Callable[[], bool], seconds: float, logs: Path | None = None) -> None:
        """Wait until something holds; what the jobs printed where it does not in time."""
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                told = [
                    f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}"
                    for path in sorted((logs or HERE).glob("*.out"))
                ]
                raise AssertionError(
                    f"{what}: not within {seconds:.0f} s\n{self.call('squeue', '-l')}\n" + "\n".join(told)
                )
            time.sleep(0.2)

    def wait_for_end(self, jobs: dict[str, str], seconds: float, logs: Path) -> dict[str, str]:
        """Wait until no job is pending or running; their states."""
        self.wait(
            f"end of {jobs}",
            lambda: not set(self.states(jobs).values()) & {"PENDING", "RUNNING", "COMPLETING", "REQUEUED"},
            seconds,
            logs,
        )
        return self.states(jobs)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of this test session's own."""
    missing = [tool for tool in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(tool) is None]
    why = f"SLURM is not installed ({', '.join(missing)}): `make test-slurm` installs it where it is root and apt-get is there"
    if not missing and os.geteuid() != 0:
        missing, why = ["root"], "the test cluster's daemons need root"
    if missing:
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("slurm")
    script = str(HERE / "cluster.sh")
    try:
        subprocess.run([script, "up", str(folder)], check=True, timeout=120)
        yield Cluster(folder)
    finally:
        subprocess.run([script, "down", str(folder)], check=False, timeout=120)


def submit_fake(
    cluster: Cluster, data: Path, folder: Path, target: str, scripts: dict[str, str], **variables: object
) -> dict[str, str]:
    """`make TARGET` with a shell script a stage as the program, run on every task; a stage without one is done at once."""
    (folder / "fake").mkdir()
    for stage, text in scripts.items():
        (folder / "fake" / stage).write_text(text + "\n")
    setup = f"export FAKE={folder / 'fake'}; python=(bash {HERE / 'jobs' / 'fake_program.sh'})"
    return cluster.make(target, DATA=data, RUN=folder / "run", PRESET=ROOT / "tests" / "conf" / "tiny.yaml", NODES=2,
                        GPUS=0, TASKS=1, PARTS=2, SETUP=setup, **variables)  # fmt: skip


@pytest.fixture
def fake(cluster: Cluster, cohort: Path, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """`fake("slurm-all", expert="exit 3")`: see `submit_fake`."""
    return lambda target, **scripts: submit_fake(cluster, cohort, tmp_path, target, scripts)


@pytest.fixture(scope="session")
def limited(cluster: Cluster, cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    """A job with a time limit of a minute, SLURM's shortest, whose program does not stop at signals; submitted early."""
    folder = tmp_path_factory.mktemp("limited")
    program = "[ $1 = 1 ] || exit 0; trap '' USR1 TERM; while :; do sleep 1; done"
    return submit_fake(cluster, cohort, folder, "slurm-stage-2", {"distill": program}, TIME=1), folder
