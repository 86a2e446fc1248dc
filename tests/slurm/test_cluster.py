"""Jobs on a real SLURM of two nodes: signalled, killed, failing, cancelled."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900), pytest.mark.usefixtures("limited")]

ROOT = Path(__file__).parents[2]
JOBS = Path(__file__).parent / "jobs"
STAGES = ("expert", "index", "distill", "align", "zero_shot", "classifier", "report")
Fake = Callable[..., dict[str, str]]


def submit_chain(cluster: Any, data: Path, run: Path) -> dict[str, str]:
    """`make slurm-all` with programs that can be held at places of RUN/holds."""
    overrides = "--trainer.callbacks+=batch_hold.BatchHold --trainer.max_epochs=3 --data.init_args.batch_size=2"
    setup = f'export PYTHONPATH="{JOBS}" CTX_TEST_HOLDS="{run / "holds"}"'
    return cluster.make("slurm-all", DATA=data, RUN=run, PRESET=ROOT / "tests" / "conf" / "tiny.yaml", NODES=2, GPUS=0,
                        TASKS=1, PARTS=2, ARGS=overrides, SETUP=setup)  # fmt: skip


class Hold:
    """A place at which the programs that come there are held; made before the jobs are submitted."""

    def __init__(self, cluster: Any, run: Path, place: str) -> None:
        self.cluster, self.folder, self.place, self.logs = cluster, run / "holds", place, run / "slurm"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{place}.wanted").touch()

    def reached(self) -> list[int]:
        """Wait until both ranks are there; their process numbers."""
        return [int(path.read_text()) for path in self._both("reached")]

    def signalled(self) -> None:
        """Wait until the signal has come to both."""
        self._both("signalled")

    def let_go(self) -> None:
        """Let them go on."""
        (self.folder / f"{self.place}.go").touch()

    def _both(self, what: str) -> list[Path]:
        paths = [self.folder / f"{self.place}.{what}-{rank}" for rank in (0, 1)]
        self.cluster.wait(f"{self.place} {what}", lambda: all(path.exists() for path in paths), 240, self.logs)
        return paths


def results(run: Path) -> dict[str, Any]:
    """What a run came to: hashes of weights, index and predictions; the losses of every epoch; metrics; fingerprints."""
    files = [path for stage in STAGES for path in sorted((run / stage / "artefact").rglob("*")) if path.is_file()]
    files += [run / "zero_shot_predictions.csv", run / "classifier" / "predictions.csv", run / "reports.csv",
              run / "index" / "retrieval.csv"]  # fmt: skip
    found: dict[str, Any] = {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    for curves in sorted(run.glob("*/logs/metrics.csv")):
        with curves.open() as table:
            rows = list(csv.DictReader(table))
        found[f"losses of {curves.parts[-3]}"] = [
            [row["step"], row.get("train/loss"), row.get("val/loss")] for row in rows
        ]
    found["metrics"] = json.loads((run / "metrics.json").read_text())
    found["fingerprints"] = {
        name: stage["fingerprint"] for name, stage in json.loads((run / "run.json").read_text())["stages"].items()
    }
    return found


def test_a_chain_that_is_signalled_and_killed_ends_as_an_undisturbed_one(
    cluster: Any, cohort: Path, tmp_path: Path
) -> None:
    calm, rough = tmp_path / "calm", tmp_path / "rough run"
    start, imports, signalled, killed = (
        Hold(cluster, rough, place)
        for place in ("expert-start", "index-imports", "distill-epoch1-batch2", "align-epoch1-batch2")
    )
    calm_jobs, jobs = submit_chain(cluster, cohort, calm), submit_chain(cluster, cohort, rough)

    # The expert while Python starts, the index during imports: both begin anew. Distillation in mid-epoch: it goes on
    # from the batch before which it stopped.
    for hold, stage in ((start, "expert"), (imports, "index"), (signalled, "distill")):
        hold.reached()
        cluster.call("scancel", "--signal=USR1", f"{jobs[stage]}.0")
        hold.signalled()
        hold.let_go()

    # Alignment: the second rank is killed in mid-epoch, after the checkpoint of the first epoch.
    _, second = killed.reached()
    os.kill(second, signal.SIGKILL)
    killed.let_go()

    assert set(cluster.wait_for_end(jobs, 420, rough / "slurm").values()) == {"COMPLETED"}
    assert set(cluster.wait_for_end(calm_jobs, 240, calm / "slurm").values()) == {"COMPLETED"}
    restarts = {name: int(cluster.job(number)["Restarts"]) for name, number in jobs.items()}
    assert restarts == {"prepare": 0, "expert": 1, "index": 1, "distill": 1, "align": 1, "heads": 0}
    told = (rough / "slurm" / f"align-{jobs['align']}.out").read_text(errors="replace")
    assert "failed with status 137; a newer checkpoint is there; time 1 of 3; requeued" in told
    came_to = results(rough)
    assert len(came_to["losses of distill"]) == 6  # a row of training and one of validation an epoch, none twice
    assert came_to == results(calm)


def test_a_failing_program_gives_the_job_its_status_and_ends_the_dependents(
    cluster: Any, fake: Fake, tmp_path: Path
) -> None:
    jobs = fake("slurm-all", expert='[ "$SLURM_PROCID" = 1 ] && exit 3; sleep 60')
    states = cluster.wait_for_end(jobs, 60, tmp_path / "run" / "slurm")
    assert cluster.job(jobs["expert"])["ExitCode"] == "3:0"
    assert states == {"prepare": "COMPLETED", "expert": "FAILED"} | dict.fromkeys(
        ("index", "distill", "align", "heads"), "CANCELLED"
    )
    assert (tmp_path / "fake" / "attempts-expert-1").read_text() == "1\n"


def test_a_failing_job_with_new_checkpoints_goes_back_to_the_queue_three_times(
    cluster: Any, fake: Fake, tmp_path: Path
) -> None:
    train = 'mkdir -p "$2/align/checkpoints"; [ "$SLURM_PROCID" = 0 ] && date +%s.%N >"$2/align/checkpoints/last.ckpt"; sleep 0.2; exit 4'
    jobs = fake("slurm-stage-3", align=train)
    assert cluster.wait_for_end(jobs, 120, tmp_path / "run" / "slurm") == {"align": "FAILED"}
    assert cluster.job(jobs["align"])["ExitCode"] == "4:0"
    assert (tmp_path / "fake" / "attempts-align-0").read_text().split() == ["1", "2", "3", "4"]


def test_dependents_wait_for_an_array_that_goes_back_to_the_queue(cluster: Any, fake: Fake, tmp_path: Path) -> None:
    prepare = '[ "$1$SLURM_ARRAY_TASK_ID" = 11 ] && exit 75; exit 0'
    distill = f'[ "$(cat {tmp_path}/fake/attempts-prepare-10 | wc -l)" = 2 ] || exit 9'
    jobs = fake("slurm-all", prepare=prepare, distill=distill)
    assert set(cluster.wait_for_end(jobs, 120, tmp_path / "run" / "slurm").values()) == {"COMPLETED"}


def test_a_job_that_a_user_cancels_stays_cancelled(cluster: Any, fake: Fake, tmp_path: Path) -> None:
    listens = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])\n"
        f"pathlib.Path('{tmp_path}/up-' + sys.argv[1]).touch()\n"
        "while True: time.sleep(.1)\n"
    )
    (tmp_path / "listens.py").write_text(listens)
    jobs = fake("slurm-stage-2", distill=f"exec python3 {tmp_path}/listens.py $SLURM_PROCID")
    number, logs = jobs["distill"], tmp_path / "run" / "slurm"
    cluster.wait("tasks", lambda: len(list(tmp_path.glob("up-*"))) == 2, 60, logs)
    cluster.call("scancel", number)
    cluster.wait("end", lambda: not cluster.call("squeue", "-h", "-j", number, check=False).strip(), 60, logs)
    assert cluster.job(number)["JobState"] == "CANCELLED"
    assert "not requeued here" in (logs / f"distill-{number}.out").read_text()
    assert (tmp_path / "fake" / "attempts-distill-0").read_text() == "1\n"


def test_python_without_srun_in_a_job_of_several_tasks_is_refused(cluster: Any, cohort: Path, tmp_path: Path) -> None:
    command = (
        f"{ROOT}/.venv/bin/ctx-distill expert --data {cohort} --run {tmp_path}/run --preset {ROOT}/tests/conf/tiny.yaml"
    )
    printed = cluster.call(
        "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/job.out", f"--wrap={command}"
    )
    jobs = {"job": printed.strip()}
    assert cluster.wait_for_end(jobs, 60, tmp_path) == {"job": "FAILED"}
    assert cluster.job(jobs["job"])["ExitCode"] == "2:0"
    assert "without srun" in (tmp_path / "job.out").read_text()


def test_a_job_at_its_time_limit_goes_on_although_its_program_could_not_stop(
    cluster: Any, limited: tuple[dict[str, str], Path]
) -> None:
    jobs, folder = limited
    assert cluster.wait_for_end(jobs, 180, folder / "run" / "slurm") == {"distill": "COMPLETED"}
    assert cluster.job(jobs["distill"])["Restarts"] == "1"
    assert (folder / "fake" / "attempts-distill-0").read_text() == "1\n2\n"
