"""Stage 3 in micro-batches under a real trainer: the weights of plain steps, on one rank and on two."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.distributed import rank, world_size
from ctx_distill.errors import InputError
from ctx_distill.stages.align.report_tower import TextSettings
from ctx_distill.stages.align.task import AlignmentTask
from ctx_distill.training.cached_batches import check_micro_batch, on_host, split_rows
from ctx_distill.types import CTBatch

VOLUME = VolumeSpec(spacing=(12.0, 12.0, 12.0), shape=(24, 32, 32), window=(-1000.0, 600.0))


def batch_of(rows: int) -> CTBatch:
    draw = torch.Generator().manual_seed(0)
    return CTBatch(
        torch.rand(rows, 1, 2, 3, 4, generator=draw) * 2 - 1, torch.arange(rows), torch.arange(rows) + 100,
        [f"report {row}" for row in range(rows)], torch.rand(rows, 5, generator=draw),
    )  # fmt: skip


def test_a_batch_is_split_into_views_of_its_rows() -> None:
    batch = batch_of(7)
    parts = split_rows(batch, 3)
    assert [len(part.report) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.volume for part in parts]), batch.volume)
    assert [report for part in parts for report in part.report] == batch.report
    assert torch.equal(torch.cat([part.labels for part in parts if part.labels is not None]), batch.labels)
    assert parts[1].volume.untyped_storage().data_ptr() == batch.volume.untyped_storage().data_ptr()
    assert all(part.labels is None for part in split_rows(replace(batch, labels=None), 3))


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_volumes_wait_on_the_host_and_the_rest_goes_to_the_device(storage: Any) -> None:
    batch = batch_of(7)

    def move(batch: CTBatch) -> CTBatch:
        return replace(batch, volume=batch.volume.to("meta"), study=batch.study.to("meta"), row=batch.row.to("meta"))

    moved = on_host(batch, storage, move)
    assert (moved.volume.device.type, moved.study.device.type, moved.row.device.type) == ("cpu", "meta", "meta")
    assert moved.volume.dtype == getattr(torch, storage)
    np.testing.assert_allclose(moved.volume.float(), batch.volume, rtol=0, atol=0 if storage == "float32" else 2**-12)


def test_a_micro_batch_without_rows_is_refused() -> None:
    check_micro_batch(None)
    with pytest.raises(InputError, match=r"micro_batch is 0; expected 1 or more"):
        check_micro_batch(0)


def train(run: str, cohort: str, folder: str, micro_batch: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """Weights, learning rates and losses of 2 optimiser steps in float64, on this process's ranks."""
    root, world = Path(run), world_size()
    L.seed_everything(3)
    rates: list[float] = []
    task = AlignmentTask(
        expert=str(root / "expert" / "artefact"), index=str(root / "index" / "artefact"),
        student=str(root / "distill" / "artefact"), micro_batch=micro_batch,
        text=TextSettings(tower="scratch", width=32, layers=1, vocab_size=300, context_length=64),
        optimizer=partial(torch.optim.SGD, lr=options.get("lr", 0.05), momentum=0.9),
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
    )  # fmt: skip
    data = CTDataModule(f"{cohort}/ct.csv", VOLUME, batch_size=options["batch"], text="required", with_labels=True)
    task.finish = lambda *_: {}  # type: ignore[method-assign]

    class Rates(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    strategy: Any = SingleDeviceStrategy("cpu")
    if world > 1:
        os.environ["LOCAL_RANK"] = str(rank())
        environment = LightningEnvironment()
        environment.set_world_size(world)
        strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=environment)
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, precision="64-true", max_steps=2, logger=False,
        callbacks=[Rates()], default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, limit_val_batches=0, **options["trainer"],
    )  # fmt: skip
    task.run(trainer, data, Path(folder))
    return {
        "weights": {name: value.double() for name, value in task.dual.state_dict().items()},
        "rates": rates,
        "loss": trainer.callback_metrics.get("train/loss", torch.tensor(torch.nan)).double(),
    }


def assert_same(result: dict[str, Any], expected: dict[str, Any], atol: float = 1e-9) -> None:
    assert result["rates"] == expected["rates"] == [0.05, 0.025]
    torch.testing.assert_close(result["loss"], expected["loss"], rtol=0, atol=atol)
    for name, value in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], value, rtol=0, atol=atol)


@pytest.mark.full
@pytest.mark.parametrize(
    "trainer",
    [{}, {"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}],
    ids=["plain", "clipped", "accumulated"],
)
def test_weights_are_those_of_plain_steps(
    finished_run: Path, cohort: Path, tmp_path: Path, trainer: dict[str, Any]
) -> None:
    options = {"batch": 4 if "accumulate_grad_batches" in trainer else 7, "trainer": trainer}
    start = train(str(finished_run), str(cohort), str(tmp_path / "a"), None, {**options, "lr": 0.0})
    expected = train(str(finished_run), str(cohort), str(tmp_path / "b"), None, options)
    result = train(str(finished_run), str(cohort), str(tmp_path / "c"), 3, options)
    assert_same(result, expected)
    moved = [name for name, value in start["weights"].items() if not torch.equal(value, expected["weights"][name])]
    assert "logit_scale" in moved
    assert any(name.startswith("ct_encoder") for name in moved)
    assert any(name.startswith("text_encoder") for name in moved)


@pytest.mark.full
@pytest.mark.ddp
def test_two_ranks_train_the_weights_of_plain_steps(
    finished_run: Path, cohort: Path, tmp_path: Path, pool: Callable[[int], Any]
) -> None:
    def steps(micro_batch: int | None) -> list[Any]:
        options = {"batch": 5, "trainer": {"gradient_clip_val": 0.1}}
        given = {"run": str(finished_run), "cohort": str(cohort), "folder": str(tmp_path / str(micro_batch))}
        return pool(2).run(__file__, "train", {**given, "micro_batch": micro_batch, "options": options})

    plain, _ = steps(None)
    for result in steps(2):
        assert_same(result, plain)


@pytest.mark.full
def test_the_stage_runs_in_micro_batches_with_volumes_in_half_precision(
    finished_run: Path, cohort: Path, tiny_preset: Path, tmp_path: Path
) -> None:
    from ctx_distill.commands.main import main

    losses = []
    for storage in ("float32", "float16"):
        run = tmp_path / storage
        shutil.copytree(finished_run, run)
        given = ["align", "--data", str(cohort), "--run", str(run), "--preset", str(tiny_preset)]
        options = [f"--model.init_args.storage={storage}", "--model.init_args.augmentation.noise=0.02"]
        assert main([*given, "--model.init_args.micro_batch=3", "--model.init_args.chunk=4", *options]) == 0
        losses.append(json.loads((run / "align" / "metrics.json").read_text())["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
