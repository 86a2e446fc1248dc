"""Stage 1 on several processes, as users and SLURM start them: stopped in the middle, and resumed on as many or on other ranks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from ctx_distill.retrieval.store import XrayIndexArtefact

pytestmark = [pytest.mark.slow, pytest.mark.ddp]
PROGRAM = Path(__file__).parents[2] / "helpers" / "watched_stage_1.py"
PART = 4
"""X-rays per rank and part of the pool."""
ALL = "1000000"


@dataclass
class Ended:
    """What a run of the stage left: statuses and output of its processes, and the rows that it embedded, of all ranks."""

    statuses: list[int]
    printed: str
    rows: list[int]


class Stage:
    """Stage 1 of one run folder, started as often as a test needs it."""

    def __init__(self, finished_run: Path, cohort: Path, preset: Path, folder: Path) -> None:
        self.folder, self.artefact = folder, folder / "run" / "index" / "artefact"
        self.command = [sys.executable, str(PROGRAM), "index", "--data", str(cohort), "--run", str(folder / "run")]
        self.command += ["--preset", str(preset), "--expert", str(finished_run / "expert" / "artefact")]
        self.command += [f"--model.init_args.part_items={PART}"]
        self.started = 0

    def launched(self, limit: str = ALL) -> Ended:
        """One command that starts two ranks by itself."""
        return self._run([({}, ["--trainer.devices=2"])], limit)

    def of_a_job(self, ranks: int, limit: str = ALL) -> Ended:
        """One process per task of a SLURM job step; the request is the same at any number of tasks."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        step = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "index", "SLURM_STEP_ID": "0", "SLURM_NNODES": "1",
                "SLURM_NTASKS": str(ranks), "SLURM_NTASKS_PER_NODE": str(ranks), "SLURM_NODEID": "0",
                "SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        return self._run(
            [({**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}, []) for rank in range(ranks)], limit
        )

    def _run(self, processes: list[tuple[dict[str, str], list[str]]], limit: str) -> Ended:
        self.started += 1
        notes = self.folder / f"notes-{self.started}"
        notes.mkdir()
        common = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        common |= {"WATCH_FOLDER": str(notes), "WATCH_LIMIT": limit}
        running = [
            subprocess.Popen([*self.command, *more], env={**common, **own}, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, start_new_session=True)
            for own, more in processes
        ]  # fmt: skip
        printed = []
        for process in running:
            try:
                printed.append(process.communicate(timeout=300)[0])
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        rows = [int(row) for path in sorted(notes.iterdir()) for row in path.read_text().split()]
        return Ended([process.returncode for process in running], "\n".join(printed), rows)


@pytest.fixture
def stage(finished_run: Path, cohort: Path, tiny_preset: Path, tmp_path: Path) -> Stage:
    return Stage(finished_run, cohort, tiny_preset, tmp_path)


def pool_rows(finished_run: Path) -> set[int]:
    return set(XrayIndexArtefact.open(finished_run / "index" / "artefact").items["row"])


def same_index(mine: Path, theirs: Path) -> None:
    """Keys, values, items and metrics of two stage folders, within 1e-6."""
    one, two = (load_file(folder / "artefact" / "model.safetensors") for folder in (mine, theirs))
    assert one.keys() == two.keys()
    for name, value in two.items():
        np.testing.assert_allclose(one[name].numpy(), value.numpy(), rtol=0, atol=1e-6, err_msg=name)
    assert (mine / "artefact" / "items.csv").read_bytes() == (theirs / "artefact" / "items.csv").read_bytes()
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (mine, theirs)]
    assert metrics[0]["pool"] == metrics[1]["pool"]


def test_two_ranks_resume_and_embed_only_what_is_missing(stage: Stage, finished_run: Path) -> None:
    """Rank 1 dies in the second part of the pool, of which rank 0 may have written its share."""
    pool = pool_rows(finished_run)
    killed = stage.launched(limit=f"{ALL},{PART}")
    assert killed.statuses != [0]
    assert len(killed.rows) == len(set(killed.rows)), "two ranks embedded the same rows"
    assert len(killed.rows) <= 3 * PART
    shards = stage.artefact.parent / "shards"
    done = {int(row) for path in shards.glob("shard-000000-*") for row in load_file(path)["row"]}
    assert len(done) == 2 * PART
    assert not (shards / "shard-000001-00001.safetensors").exists()

    resumed = stage.launched()
    assert resumed.statuses == [0], resumed.printed
    parts = -(-len(pool) // (2 * PART))
    assert resumed.printed.count(f"1 of {parts} parts of the pool are already embedded") == 1
    assert set(resumed.rows) == pool - done
    same_index(stage.artefact.parent, finished_run / "index")


def test_a_requeue_on_other_ranks_keeps_what_is_embedded(stage: Stage, finished_run: Path) -> None:
    pool = pool_rows(finished_run)
    shards = stage.artefact.parent / "shards"

    def done() -> set[int]:
        found = [int(row) for path in shards.glob("shard-*") for row in load_file(path)["row"]]
        assert len(found) == len(set(found))
        return set(found)

    assert stage.of_a_job(2, limit=str(PART)).statuses != [0, 0]
    first = done()
    assert PART <= len(first) <= 2 * PART

    three = stage.of_a_job(3, limit=str(PART))
    assert 2 not in three.statuses
    assert three.printed.count("shards of 2 ranks") == 1
    assert not first & set(three.rows)
    second = done()
    assert first < second

    alone = stage.of_a_job(1)
    assert alone.statuses == [0], alone.printed
    assert alone.printed.count("shards of 3 ranks") == 1
    assert not second & set(alone.rows)
    assert second | set(alone.rows) == pool
    same_index(stage.artefact.parent, finished_run / "index")
