"""Resuming with another number of ranks, and in the midst of an accumulated step: schedule, rows, weights."""

from __future__ import annotations

import contextlib
import io
import math
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import Dataset

from ctx_distill import signals
from ctx_distill.data.loading.datamodules import ManifestDataModule
from ctx_distill.data.loading.order import EpochBatches, EpochShuffle
from ctx_distill.distributed import rank, world_size
from ctx_distill.training.base_task import TrainedTask
from ctx_distill.training.fault_tolerance import SurvivalSettings

RATE, EPOCHS, BATCH = 0.01, 4, 2


@dataclass
class Batch:
    """row (b,)."""

    row: Tensor


class Numbers(Dataset[Any]):
    """Item n is n."""

    def __getitem__(self, index: Any) -> Any:
        return index


class Data(ManifestDataModule):
    """`rows` numbers, shuffled as a manifest's rows are."""

    collate = staticmethod(lambda items: Batch(torch.tensor(items)))  # type: ignore[assignment]

    def __init__(self, rows: int) -> None:
        super().__init__(BATCH, BATCH, 0, 0.0, 3)
        self.rows = rows

    def training_rows(self) -> Any:
        return range(self.rows)

    def dataset(self, manifest: Any) -> Any:
        return Numbers()

    def val_dataloader(self) -> Any:
        return []


class Toy(TrainedTask):
    """A linear model that notes epoch, learning rate and rows of every batch; the last rank stops the run in a batch."""

    def __init__(self, stop: tuple[int, int] | None, scheduler: Any) -> None:
        survival = SurvivalSettings(hang_minutes=0)
        super().__init__(partial(torch.optim.AdamW, lr=RATE), scheduler, 0.1, "last", survival)
        self.w = nn.Parameter(torch.zeros(3))
        self.stop = stop
        self.seen: list[tuple[int, float, list[int]]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, self.trainer.optimizers[0].param_groups[0]["lr"], batch.row.tolist()))
        if (self.current_epoch, batch_idx) == self.stop and rank() == world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        x = torch.sin(batch.row[:, None] * torch.tensor([0.3, 0.7, 1.1]))
        loss = (x @ self.w - torch.cos(batch.row.float())).square().mean()
        self.log_terms({"loss": loss}, "train", len(batch.row))
        return loss

    def finish(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        return {}


def train(
    folder: str, rows: int, stop: tuple[int, int] | None, together: int = 1, custom: bool = False
) -> dict[str, Any]:
    """What this rank has seen, and its weights, up to the end or to where the run was stopped."""
    L.seed_everything(1)
    strategy: Any = "auto"
    if world_size() > 1:
        os.environ["LOCAL_RANK"] = str(rank())
        environment = LightningEnvironment()
        environment.set_world_size(world_size())
        strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=environment)
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.9) if custom else None
    task, stopped = Toy(stop, scheduler), False
    trainer = L.Trainer(
        accelerator="cpu", devices=world_size(), strategy=strategy, max_epochs=EPOCHS, default_root_dir=folder,
        accumulate_grad_batches=together, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    printed = io.StringIO()
    with signals.listening(), contextlib.redirect_stdout(printed):
        try:
            task.run(trainer, Data(rows), Path(folder))
        except signals.StopRequested:
            stopped = True
    state = trainer.optimizers[0].state_dict()["state"][0] if not stopped else {}
    return {"seen": task.seen, "weights": task.w.detach(), "state": state, "stopped": stopped, "order": task._order,
            "printed": printed.getvalue()}  # fmt: skip


def expected_rate(share: float, steps: int) -> float:
    """The schedule's at a share of the training, of a run of so many steps."""
    position, warmup = share * steps, round(0.1 * steps)
    if position < warmup:
        return RATE * (position + 1) / warmup
    return RATE * 0.5 * (1 + math.cos(math.pi * (position - warmup) / (steps - warmup)))


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("before", "after", "rows", "stop", "together", "within"),
    [
        (1, 2, 24, (1, 5), 1, 1e-9),
        (1, 2, 24, (0, 11), 1, 1e-9),  # the signal is seen at the first batch of the next epoch
        (1, 2, 24, (1, 3), 2, 1e-9),
        (2, 1, 24, (1, 1), 1, 1e-9),
        (2, 4, 27, (1, 2), 1, 0.5),  # 12 rows are left, in two batches of 6: 2, 2, 1 and 1 row
        (1, 2, 26, (2, 3), 1, 1.0),  # 18 rows are left, in five batches of 4 or 3
    ],
)
def test_another_number_of_ranks_goes_on_with_the_schedule_and_sees_every_row_once(
    pool: Callable[[int], Any], tmp_path: Path, before: int, after: int, rows: int, stop: tuple[int, int], together: int,
    within: float,
) -> None:  # fmt: skip
    """`within`: by how many steps of the first run the schedule may be off inside the interrupted epoch."""

    def run(ranks: int, stop: tuple[int, int] | None) -> list[dict[str, Any]]:
        given = {"folder": str(tmp_path), "rows": rows, "stop": stop, "together": together}
        return [train(**given)] if ranks == 1 else list(pool(ranks).run(__file__, "train", given))

    first = run(before, stop)
    assert all(each["stopped"] for each in first)
    second = run(after, None)
    assert len({each["order"] for each in second}) == after
    per_epoch = rows // before // BATCH * BATCH * before
    steps = EPOCHS * -(-(per_epoch // BATCH // before) // together)
    for epoch in range(stop[0], EPOCHS):
        seen = Counter(
            row for part in (*first, *second) for one, _, batch in part["seen"] if one == epoch for row in batch
        )
        whole = per_epoch if epoch <= stop[0] else rows // after // BATCH * BATCH * after
        assert set(seen.values()) == {1}, (epoch, seen)
        assert len(seen) == whole, epoch
    done = Counter({epoch: sum(len(batch) for part in first for one, _, batch in part["seen"] if one == epoch)
                    for epoch in range(EPOCHS)})  # fmt: skip
    batches = [
        (rates[0][0], rates[0][1], sum(len(batch) for _, _, batch in rates))
        for rates in zip(*(part["seen"] for part in second), strict=True)
    ]
    for number, (epoch, rate, count) in enumerate(batches):
        begins = number % together == 0
        whole = per_epoch if epoch == stop[0] else rows // after // BATCH * BATCH * after
        share = (epoch + done[epoch] / whole) / EPOCHS
        if begins:
            slack = (within if epoch == stop[0] else 1e-9) / steps
            low, high = sorted(expected_rate(share + sign * slack, steps) for sign in (-1, 1))
            assert low - 1e-12 <= rate <= high + 1e-12, (epoch, number)
        done[epoch] += count
    assert batches[-1][1] < 0.1 * RATE


def test_a_stop_inside_an_accumulated_step_loses_no_gradient(tmp_path: Path) -> None:
    """Ten batches per epoch in steps of 4, 4 and 2; the signal comes in the second batch of a step."""
    whole = train(str(tmp_path / "whole"), 20, None, together=4)
    stopped = train(str(tmp_path / "stopped"), 20, (1, 5), together=4)
    assert stopped["stopped"]
    assert len(stopped["seen"]) == 18
    resumed = train(str(tmp_path / "stopped"), 20, None, together=4)
    assert stopped["seen"] + resumed["seen"] == whole["seen"]
    assert resumed["order"] == whole["order"]
    assert torch.equal(resumed["weights"], whole["weights"])
    for name, value in whole["state"].items():
        assert torch.equal(resumed["state"][name], value), name


@pytest.mark.ddp
def test_a_scheduler_of_the_configuration_goes_on_from_its_step_and_says_so(
    pool: Callable[[int], Any], tmp_path: Path
) -> None:
    first = train(str(tmp_path), 24, (1, 5), custom=True)
    second, other = pool(2).run(__file__, "train", {"folder": str(tmp_path), "rows": 24, "stop": None, "custom": True})
    assert second["seen"][0][1] == pytest.approx(RATE * 0.9 ** len(first["seen"]))
    assert second["seen"][1][1] == pytest.approx(RATE * 0.9 ** (len(first["seen"]) + 1))
    assert "counts optimiser steps" in second["printed"]
    assert "counts optimiser steps" not in other["printed"]


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    "state", [{"epoch": 1, "items": 10}, {"epoch": 1, "start": 10, "end": 24, "batches": 7, "ranks": 1}]
)
def test_the_data_go_on_where_a_checkpoint_stopped(opened: bool, state: dict[str, int]) -> None:
    """Also a checkpoint of before ranks could change, and one that is restored when the loader is open (FSDP2)."""
    whole = EpochBatches(EpochShuffle(24, 3), BATCH)
    whole.set_epoch(1)
    data = Data(24)
    loader = data.train_dataloader() if opened else None
    data.load_state_dict(state)
    assert data.reopen == opened
    loader = loader or data.train_dataloader()
    assert [batch.row.tolist() for batch in loader] == list(whole)[5:]  # type: ignore[attr-defined]
