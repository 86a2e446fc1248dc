"""A hang ends in an error that names the rank, a slow run does not. This file is also the processes it starts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ctx_distill.distributed import rank, world_size
from ctx_distill.training.callbacks.rank_records import RankRecord, explain, read_records, write_record
from ctx_distill.training.callbacks.watchdog import HUNG, Watchdog

MINUTES = 0.25


class Faulty(L.LightningModule):
    """Meets a fault in the fourth batch, on the last rank."""

    def __init__(self, fault: str = "none", ranks: Path | None = None) -> None:
        super().__init__()
        self.net, self.fault, self.ranks = nn.Linear(2, 1), fault, ranks
        self.record: dict[str, object] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.fault == "slow":
            time.sleep(60 * MINUTES / 5)
        elif batch_idx == 3 and rank() == world_size() - 1:
            self.meet()
        return self.net(batch).square().mean()

    def meet(self) -> None:
        if self.fault == "hangs":
            time.sleep(3600)
        elif self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault == "raises":
            raise ValueError("a rank's own")
        elif self.ranks is not None:
            end = time.monotonic() + 60
            while self.record.get("phase") != "train batch 3" and time.monotonic() < end:
                time.sleep(0.05)
                self.record = json.loads((self.ranks / "rank-00000.json").read_text())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.net(batch).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: Faulty, folder: Path, watchdog: Watchdog, world: int = 1) -> None:
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

    strategy = DDPStrategy(process_group_backend="gloo") if world > 1 else SingleDeviceStrategy("cpu")
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False,
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, callbacks=[watchdog],
    )  # fmt: skip
    data = DataLoader([torch.ones(2)] * 10 * world)  # type: ignore[arg-type]
    trainer.fit(module, data, data)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(fault: str, folder: Path, world: int) -> list[subprocess.Popen[str]]:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0", "GLOO_SOCKET_IFNAME": "lo",
              "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, __file__, fault, str(folder), str(world)],
            env={**os.environ, **shared, "LOCAL_RANK": str(number)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3],
        )
        for number in range(world)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str]]]:
    """Exit status and stderr of each rank of three runs, which run beside each other since they mostly sleep."""
    folder = tmp_path_factory.mktemp("watchdog")
    runs = {fault: start(fault, folder / fault, world) for fault, world in (("hangs", 2), ("killed", 2), ("slow", 1))}
    result: dict[str, list[tuple[int, str]]] = {}
    for fault, processes in runs.items():
        result[fault] = []
        for process in processes:
            try:
                _, said = process.communicate(timeout=200)
            except subprocess.TimeoutExpired:
                process.kill()
                _, said = process.communicate()
                said += "\nnever ended"
            result[fault].append((process.returncode, said))
    result["left"] = [(0, str(path.relative_to(folder))) for path in folder.glob("*/ranks/*")]
    return result


@pytest.mark.full
@pytest.mark.ddp
def test_a_rank_that_hangs_is_named_and_the_run_ends(ended: dict[str, list[tuple[int, str]]]) -> None:
    (first, first_said), (second, second_said) = ended["hangs"]
    assert second == HUNG, second_said
    assert first != 0
    assert "never ended" not in first_said + second_said
    assert "ctx-distill: rank 1 (host " in second_said
    assert "min; it is in training step 3, train batch 3, at test_watchdog.py:" in second_said
    assert "has made no progress for " in second_said
    assert "in meet; rank 0 waits for it" in second_said
    assert "in training_step" in second_said, "the stack of the main thread"
    # The other rank either saw the same, or the connection break when the first of them had ended.
    assert "ctx-distill: rank 1 (host " in first_said or "Error" in first_said


@pytest.mark.full
@pytest.mark.ddp
def test_a_rank_whose_process_is_gone_is_named(ended: dict[str, list[tuple[int, str]]]) -> None:
    (first, first_said), (second, _) = ended["killed"]
    assert second == -signal.SIGKILL
    assert first not in (0, -signal.SIGKILL), first_said
    assert "ctx-distill: rank 1 (host " in first_said
    assert "does not respond" in first_said
    assert "last seen at training step" in first_said


@pytest.mark.full
def test_a_slow_run_that_moves_is_left_alone(ended: dict[str, list[tuple[int, str]]]) -> None:
    ((status, said),) = ended["slow"]  # ten batches of a fifth of the limit each
    assert status == 0, said
    assert "ctx-distill:" not in said
    assert not [name for _, name in ended["left"] if name.startswith("slow")]


@pytest.mark.full
def test_records_are_there_in_a_run_and_removed_at_its_end(tmp_path: Path) -> None:
    module = Faulty(ranks=tmp_path / "ranks")
    fit(module, tmp_path, Watchdog())
    assert [module.record[name] for name in ("pid", "phase", "step")] == [os.getpid(), "train batch 3", 3]
    assert not list((tmp_path / "ranks").iterdir())


def test_a_rank_that_raises_leaves_word(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="own"):
        fit(Faulty("raises"), tmp_path, Watchdog())
    record = read_records(tmp_path / "ranks", 1, time.time())[0]
    assert record is not None
    assert (record.ended, record.phase, record.step) == ("ended with ValueError", "train batch 3", 3)
    assert record.at.endswith("in meet")


def test_zero_minutes_switch_it_off(tmp_path: Path) -> None:
    fit(Faulty(), tmp_path, Watchdog(minutes=0))
    assert not (tmp_path / "ranks").exists()


ONE = RankRecord(0, "n1", 10, 117, "train batch 17", (18, 1), "x.py:3 in f", False, 1800.0, 360, 1000.0)
WHERE = "training step 117, train batch 17, at x.py:3 in f"


def of(number: int, **changes: object) -> RankRecord:
    return replace(ONE, rank=number, pid=10 + number, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("records", "silent", "expected"),
    [
        pytest.param(
            {0: of(0, place=(18, 2)), 1: of(1), 2: of(2, place=(18, 2))}, set(),
            f"rank 1 (host n1, process 11) has made no progress for 30 min; it is in {WHERE}; "
            "ranks 0, 2 wait for it",
            id="least far",
        ),
        pytest.param(
            {0: of(0, waiting=True), 1: of(1, waiting=True), 2: of(2)}, set(),
            f"rank 2 (host n1, process 12) has made no progress for 30 min; it is in {WHERE}; "
            "ranks 0, 1 wait for it",
            id="equally far, one does not wait in a collective",
        ),
        pytest.param(
            {0: of(0, place=(2, 9)), 1: of(1, place=(3, 1))}, set(),
            f"rank 0 (host n1, process 10) has made no progress for 30 min; it is in {WHERE}; "
            "rank 1 waits for it",
            id="batches count before what follows them",
        ),
        pytest.param(
            {0: of(0, place=(18, 0)), 1: of(1, place=(19, 4))}, {1},
            "rank 1 (host n1, process 11) does not respond: its process has ended or its machine is down; last seen at "
            "training step 117, train batch 17, at x.py:3 in f; rank 0 waits for it",
            id="gone, though it was ahead",
        ),
        pytest.param(
            {0: of(0, place=(18, 0)), 1: of(1, ended="ended with ValueError")}, set(),
            "rank 1 (host n1, process 11) ended with ValueError at training step 117, train batch 17, at x.py:3 in f; "
            "rank 0 waits for it",
            id="ended with an error",
        ),
        pytest.param(
            {0: of(0, place=(18, 2)), 1: of(1, ended="stopped by its watchdog", hung=True)}, set(),
            f"rank 1 (host n1, process 11) has made no progress for 30 min; it is in {WHERE}; "
            "rank 0 waits for it",
            id="stopped by its own watchdog first",
        ),
        pytest.param(
            {0: of(0, waiting=True), 1: None}, set(),
            "rank 1 has no record: it has not started this run, or has exited; rank 0 waits for it",
            id="no record, and the others wait",
        ),
        pytest.param(
            {0: of(0), 1: None}, set(),
            f"rank 0 (host n1, process 10) has made no progress for 30 min; it is in {WHERE}",
            id="no record, since it is through",
        ),
    ],
)  # fmt: skip
def test_who_the_others_wait_for(records: dict[int, RankRecord | None], silent: set[int], expected: str) -> None:
    assert explain(records, silent) == expected


def test_records_of_an_earlier_run_and_torn_ones_are_none(tmp_path: Path) -> None:
    for number, written in enumerate((1000.0, 5000.0, 4990.0)):
        write_record(tmp_path, of(number, written=written))
    (tmp_path / "rank-00003.json").write_text('{"rank": 3, "ho')
    (tmp_path / "rank-00009.json").write_text("of a run of more ranks")
    records = read_records(tmp_path, 5, since=5000.0)
    assert records == {0: None, 1: of(1, written=5000.0), 2: of(2, written=4990.0), 3: None, 4: None}


if __name__ == "__main__":
    fit(Faulty(), Path(sys.argv[2]), Watchdog(0))  # on a busy machine the first imports take long; they are no hang
    fit(Faulty(sys.argv[1]), Path(sys.argv[2]), Watchdog(MINUTES), int(sys.argv[3]))
