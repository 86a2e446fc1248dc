"""Steps that are not finite change nothing, are counted and at last end the run with a dump; finite ones are never skipped."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from ctx_distill.distributed import rank, world_size
from ctx_distill.errors import InputError
from ctx_distill.training.callbacks import loss_guard
from ctx_distill.training.callbacks.loss_guard import LossGuard


@dataclass
class Rows:
    """x (4, 3), y (4, 1), row (4,); `kind` is the fault that the module makes of it."""

    x: Tensor
    y: Tensor
    row: Tensor
    kind: str = ""


class Small(L.LightningModule):
    """A network with a batch norm; keeps its first weight after each batch."""

    def __init__(self, make_optimizer: Callable[..., Any], make_schedule: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.make_optimizer, self.make_schedule = make_optimizer, make_schedule
        self.seen: list[float] = []

    def training_step(self, batch: Rows, batch_idx: int) -> Tensor:
        loss = (self.net(batch.x) - batch.y).square().mean()
        if batch.kind == "constant":  # a loss that is NaN and has finite gradients
            loss = loss + torch.tensor(math.nan)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(float(next(self.parameters()).detach().flatten()[0]))

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_schedule(optimizer), "interval": "step"},
        }


ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)


def batches(count: int, seed: int = 1, **kinds: Sequence[int]) -> list[Rows]:
    """`count` batches; those named under a kind of fault are faulty."""
    draw = torch.Generator().manual_seed(seed)
    made = [
        Rows(torch.randn(4, 3, generator=draw), torch.randn(4, 1, generator=draw), torch.arange(4) + 4 * number)
        for number in range(count)
    ]
    for kind, numbers in kinds.items():
        for number in numbers:
            made[number] = replace(made[number], kind=kind)
            if kind == "nan":
                made[number].x[1, 2] = math.nan
    return made


def fit(
    data: list[Rows],
    guard: LossGuard | None,
    folder: Path,
    module: Small | None = None,
    ckpt: Path | None = None,
    **more: Any,
) -> tuple[Small, L.Trainer]:
    module = module or Small(ADAMW)
    callbacks: list[L.Callback] = [] if guard is None else [guard]
    settings = {"max_epochs": 1, "strategy": SingleDeviceStrategy("cpu"), "devices": 1, "callbacks": []} | more
    settings["callbacks"] = callbacks + settings["callbacks"]
    trainer = L.Trainer(
        accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=bool(more.get("callbacks")), use_distributed_sampler=False, **settings,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None), ckpt_path=ckpt, weights_only=True)  # type: ignore[arg-type]
    return module, trainer


def assert_same_state(one: tuple[Small, L.Trainer], other: tuple[Small, L.Trainer]) -> None:
    """Weights, running statistics and the optimizer's whole state, to the bit."""
    for name, value in other[0].state_dict().items():
        assert torch.equal(one[0].state_dict()[name], value), name
    states = [each.optimizers[0].state_dict() for _, each in (one, other)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for number, state in states[1]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(states[0]["state"][number][name]), torch.as_tensor(value)), name


@pytest.mark.parametrize("kind", ["nan", "constant"])
def test_bad_batches_leave_the_state_of_a_run_without_them(tmp_path: Path, kind: str) -> None:
    data = batches(14, **{kind: [0, 5, 6, 13]})
    guard = LossGuard()
    faulty = fit(data, guard, tmp_path)
    assert guard.skipped == 4
    assert faulty[1].global_step == 14
    assert faulty[1].callback_metrics["train/skipped_steps"] == 4
    assert_same_state(faulty, fit([each for each in data if not each.kind], None, tmp_path))


def test_without_the_guard_such_a_batch_ruins_the_weights(tmp_path: Path) -> None:
    module, _ = fit(batches(6, nan=[2]), None, tmp_path)
    assert all(parameter.isnan().any() for parameter in module.parameters())


class Given(Small):
    """Its gradient has the norm that the batch's number says."""

    def __init__(self, norms: Sequence[float]) -> None:
        super().__init__(partial(torch.optim.SGD, lr=1e-3))
        self.net = nn.Sequential()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.norms = norms

    def training_step(self, batch: Rows, batch_idx: int) -> Tensor:
        return self.w.sum() * self.norms[batch_idx]


def test_a_plateau_before_learning_begins_is_not_a_fault(tmp_path: Path) -> None:
    """InfoNCE from scratch: norms near .02 for a while, then near 9 for good, and once 5,000."""
    norms = [0.02 + 1e-4 * (step % 7) for step in range(120)] + [9.0 + 0.1 * (step % 5) for step in range(60)] + [5e3]
    guard = LossGuard(largest_skips=1)
    module, trainer = fit(batches(len(norms)), guard, tmp_path, Given(norms), gradient_clip_val=20.0)
    assert guard.skipped == 0
    moved = [before - after for before, after in pairwise([0.0, *module.seen])]
    assert moved == pytest.approx([1e-3 * min(norm, 20.0) for norm in norms], rel=1e-4)
    assert guard.clipped == 1
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged == {
        "train/skipped_steps": 0.0, "train/clipped_steps": 1.0, "train/largest_gradient_norm": 5e3
    }  # fmt: skip


def test_the_epoch_s_counts_are_its_own(tmp_path: Path) -> None:
    class Logged(L.Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[float, float, float]] = []

        def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
            names = ("train/skipped_steps", "train/clipped_steps", "train/largest_gradient_norm")
            self.seen.append(tuple(float(trainer.callback_metrics[name]) for name in names))  # type: ignore[arg-type]

    logged = Logged()
    module = Given([1.0, math.nan, 30.0, 2.0])
    fit(batches(4), LossGuard(), tmp_path, module, gradient_clip_val=20.0, max_epochs=2, callbacks=[logged])
    assert logged.seen == [(1.0, 1.0, 30.0)] * 2


class NoReading(TorchDispatchMode):
    """Refuses what makes the host wait for a tensor's value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default), "the host waited"
        return func(*args, **(kwargs or {}))


def test_a_step_is_skipped_on_the_device_without_the_host_reading_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU runs, on the CPU: a fused optimizer, norms that are read every ten steps."""
    fused = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True)
    monkeypatch.setattr(loss_guard, "_is_free_to_read", lambda norm: False)
    unread: list[int] = []

    class Watched(LossGuard):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            due = len(self._pending) + 1 >= loss_guard.READ_EVERY
            with contextlib.nullcontext() if due else NoReading():
                super().on_before_optimizer_step(trainer, pl_module, optimizer)
                self.clip(optimizer, 1e6)
            unread.append(len(self._pending))

    data = batches(27, nan=[0, 5, 6], constant=[20])
    guard = Watched()
    faulty = fit(data, guard, tmp_path, Small(fused))
    assert unread[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert guard.skipped == 4
    assert_same_state(faulty, fit([each for each in data if not each.kind], None, tmp_path, Small(fused)))


def test_bad_steps_in_a_row_end_a_run_on_the_device_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reading comes up to ten steps later; the step that is named is the one that was too much."""
    monkeypatch.setattr(loss_guard, "_is_free_to_read", lambda norm: False)
    fused = partial(torch.optim.AdamW, lr=0.01, fused=True)
    with pytest.raises(InputError, match=r"step 4: 3 bad steps in a row .*rows \[16, 17, 18, 19\]"):
        fit(batches(30, nan=[2, 3, 4]), LossGuard(largest_skips=3), tmp_path, Small(fused))
    assert (tmp_path / "fault" / "step-4.json").is_file()
    with pytest.raises(InputError, match="step 13: 3 bad steps in a row"):  # read at the end of the epoch
        fit(batches(14, nan=[11, 12, 13]), LossGuard(largest_skips=3), tmp_path, Small(fused))


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_run_without_faults_is_bit_identical(tmp_path: Path, clip: float | None) -> None:
    schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    made = [
        fit(batches(25), guard, tmp_path, Small(ADAMW, schedule), gradient_clip_val=clip)
        for guard in (LossGuard(), None)
    ]
    assert_same_state(*made)


def test_an_accumulated_step_goes_with_its_bad_batch(tmp_path: Path) -> None:
    data = batches(12, nan=[4])  # the first of the third step
    guard = LossGuard()
    faulty = fit(data, guard, tmp_path, accumulate_grad_batches=2)
    assert guard.skipped == 1
    assert_same_state(faulty, fit(data[:4] + data[6:], None, tmp_path, accumulate_grad_batches=2))


def test_the_bad_batch_of_an_accumulated_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"step 2: 1 bad .*loss nan.*rows \[16, 17, 18, 19\]"):
        fit(batches(12, nan=[4]), LossGuard(largest_skips=1), tmp_path, accumulate_grad_batches=2)
    (mine,) = json.loads((tmp_path / "fault" / "step-2.json").read_text())["ranks"]
    assert mine["rows"] == [[16, 17, 18, 19], [20, 21, 22, 23]]
    assert [loss == "nan" for loss in mine["losses"]] == [True, False]


def test_it_stops_after_a_set_number_in_a_row_with_a_dump(tmp_path: Path) -> None:
    data = batches(14, nan=[1, 2, 4, 5, 9, 10, 11])
    guard = LossGuard(largest_skips=3)
    module = Small(ADAMW)
    with pytest.raises(InputError, match=r"step 11: 3 bad steps in a row \(loss nan.*rows \[44, 45, 46, 47\]"):
        fit(data, guard, tmp_path, module)
    assert guard.skipped == 7
    dump = json.loads((tmp_path / "fault" / "step-11.json").read_text())
    assert dump["step"] == 11
    assert dump["gradient_norm"] == "nan"
    assert dump["ranks"] == [{"rank": 0, "losses": ["nan"], "rows": [[44, 45, 46, 47]]}]
    assert len(dump["last_norms"]) == 5
    assert dump["learning_rate"] == [0.01]
    names = [name for name, _ in module.named_parameters()]
    assert dump["not_finite"] == {"gradients": sorted(names), "weights": []}
    assert not [path for path in (tmp_path / "fault").iterdir() if path.suffix == ".part"]


def test_the_stop_is_told_where_no_dump_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "fault").write_text("a file in the folder's place")
    with pytest.raises(InputError, match="No dump in"):
        fit(batches(3, nan=[0]), LossGuard(largest_skips=1), tmp_path)


def test_a_resumed_run_ends_as_one_that_did_not_stop(tmp_path: Path) -> None:
    """The first epoch ends with two bad steps in a row, and the second begins with one more."""
    epochs = [batches(14, nan=[12, 13]), batches(14, seed=2, nan=[0])]

    class Epochs(Small):
        def training_step(self, batch: Rows, batch_idx: int) -> Tensor:
            return super().training_step(epochs[self.current_epoch][batch_idx], batch_idx)

    guards = [LossGuard(), LossGuard(), LossGuard()]
    whole = fit(epochs[0], guards[0], tmp_path, Epochs(ADAMW), max_epochs=2)
    keep = ModelCheckpoint(tmp_path, "half", save_on_train_epoch_end=True)
    fit(epochs[0], guards[1], tmp_path, Epochs(ADAMW), callbacks=[keep])
    resumed = fit(epochs[0], guards[2], tmp_path, Epochs(ADAMW), tmp_path / "half.ckpt", max_epochs=2)
    assert_same_state(resumed, whole)
    assert [guard.skipped for guard in guards] == [3, 2, 3]
    assert guards[2].state_dict() == guards[0].state_dict()
    for _, trainer in (whole, resumed):
        assert trainer.callback_metrics["train/skipped_steps"] == 1
    bad = fit(epochs[0], LossGuard(largest_skips=4), tmp_path, Epochs(ADAMW), tmp_path / "half.ckpt", max_epochs=2)
    assert bad[0].current_epoch == 2
    with pytest.raises(InputError, match="step 14: 3 bad steps in a row"):
        fit(epochs[0], LossGuard(largest_skips=3), tmp_path, Epochs(ADAMW), tmp_path / "half.ckpt", max_epochs=2)


def test_the_state_of_a_guard_of_before_clipping_is_taken() -> None:
    guard = LossGuard()
    guard.load_state_dict({"skipped": 5, "in_epoch": 2, "in_a_row": 1, "behind": 30, "norms": [1.0] * 100})
    assert guard.state_dict() == {
        "skipped": 5, "clipped": 0, "largest": 0.0, "epoch_began": [3, 0], "in_a_row": 1, "norms": [1.0] * 10
    }  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scale", [2.0, 2.0**24])
def test_with_a_scaler_the_scaler_skips_and_the_guard_counts(tmp_path: Path, fused: bool, scale: float) -> None:
    """At the largest scale many steps overflow before the scaler has found its scale; none of them ends the run."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    guard = LossGuard(largest_skips=2)
    module = Small(partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=fused))
    states: list[dict[str, Tensor]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            state = trainer.optimizers[0].state_dict()["state"].get(0, {})
            states.append({"weight": next(module.parameters()).detach().clone(),
                           **{name: value.clone() for name, value in state.items()}})  # fmt: skip

    class Clipped(LossGuard):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            self.clip(optimizer, 1e-2)  # as `TrainedTask` does; Lightning's own refuses fused optimizers under a scaler

    guard = Clipped(largest_skips=3)
    fit(batches(40, nan=[30]), guard, tmp_path, module, plugins=[plugin], callbacks=[Watch()])
    stood = sum(torch.equal(one["weight"], other["weight"]) for one, other in pairwise(states))
    assert guard.skipped - stood in (0, 1), "the first step has none before it"
    assert (guard.skipped > 4) == (scale > 2)
    for name, value in states[30].items():
        assert torch.equal(value, states[29][name]), name
    assert states[31]["step"] == states[30]["step"] + 1
    assert 0.01 < guard.state_dict()["norms"][-1] < 100, "the norm is the unscaled gradient's"


def test_infinities_are_ours_once_the_scale_is_down(tmp_path: Path) -> None:
    """A finite loss with a NaN gradient: no scale will ever help."""

    class Root(Small):
        def training_step(self, batch: Rows, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + (next(self.parameters()).sum() * 0).sqrt()

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
    guard = LossGuard(largest_skips=3)
    with pytest.raises(InputError, match="step 6: 3 bad steps in a row"):
        fit(batches(12), guard, tmp_path, Root(ADAMW), plugins=[plugin])  # 16, 8, 4, 2, then 1: steps 4, 5, 6
    assert guard.skipped == 7


def test_shards_that_do_not_say_so_are_refused() -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False)
    trainer._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(InputError, match="FSDPStrategy"):
        LossGuard().setup(trainer, Small(ADAMW), "fit")


def train_rank(folder: str, bad: list[int], kind: str) -> dict[str, Any]:
    """What a rank ends with where the last rank alone meets faults."""
    os.environ["LOCAL_RANK"] = str(rank())
    environment = LightningEnvironment()
    environment.set_world_size(world_size())
    faults = {kind: bad} if rank() == world_size() - 1 else {}
    guard = LossGuard(largest_skips=3)
    module, stopped = Small(ADAMW), ""
    strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=environment)
    try:
        fit(batches(10, seed=rank(), **faults), guard, Path(folder), module, strategy=strategy, devices=world_size())
    except InputError as error:
        stopped = str(error)
    weights = {name: value for name, value in module.state_dict().items() if "running" not in name}
    return {"weights": weights, "skipped": guard.skipped, "stopped": stopped}


@pytest.mark.ddp
@pytest.mark.parametrize("kind", ["nan", "constant"])
def test_all_ranks_leave_out_what_one_rank_meets(pool: Callable[[int], Any], tmp_path: Path, kind: str) -> None:
    first, second = pool(2).run(__file__, "train_rank", {"folder": str(tmp_path), "bad": [2, 6], "kind": kind})
    assert first["skipped"] == second["skipped"] == 2
    assert all(value.isfinite().all() for value in first["weights"].values())
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


@pytest.mark.ddp
def test_the_dump_holds_the_rows_of_every_rank(pool: Callable[[int], Any], tmp_path: Path) -> None:
    bad = [2, 3, 4]
    first, second = pool(2).run(__file__, "train_rank", {"folder": str(tmp_path), "bad": bad, "kind": "constant"})
    assert "step 4: 3 bad steps in a row (loss 0" not in second["stopped"]
    assert "3 bad steps in a row (loss nan" in second["stopped"]
    assert "3 bad steps in a row" in first["stopped"]
    ranks = json.loads((tmp_path / "fault" / "step-4.json").read_text())["ranks"]
    assert [each["losses"] == ["nan"] for each in ranks] == [False, True]
    assert [each["rows"] for each in ranks] == [[[16, 17, 18, 19]]] * 2


class Sharded(Small):
    """The network under FSDP2, without the batch norm."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        self.net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
        assert self.device_mesh is not None
        for part in (self.net[0], self.net[2], self):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def train_sharded_rank(folder: str, fused: bool) -> dict[str, Any]:
    """What a rank of two ends with where the last one alone meets NaN."""
    os.environ["LOCAL_RANK"] = str(rank())
    environment = LightningEnvironment()
    environment.set_world_size(world_size())
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    faults = {"nan": [2, 6]} if rank() == 1 else {}
    guard, data = LossGuard(), batches(12, seed=rank(), **faults)
    module = Sharded(partial(ADAMW, fused=fused))
    fit(data, guard, Path(folder), module, strategy=strategy, plugins=[environment], devices=2)
    weights = {name: shard.full_tensor().detach() for name, shard in module.named_parameters()}  # type: ignore[operator]
    return {"weights": weights, "skipped": guard.skipped, "norms": guard.state_dict()["norms"]}


@pytest.mark.ddp
@pytest.mark.parametrize("fused", [False, True])
def test_ranks_that_hold_shards_decide_alike(pool: Callable[[int], Any], tmp_path: Path, fused: bool) -> None:
    first, second = pool(2).run(__file__, "train_sharded_rank", {"folder": str(tmp_path), "fused": fused})
    assert first["skipped"] == second["skipped"] == 2
    assert first["norms"] == second["norms"]
    assert all(value.isfinite().all() for value in first["weights"].values())


def sharded_norm(gradients: list[Tensor]) -> dict[str, float]:
    """The guard's norm of gradients split over the ranks by rows, all but the first one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from ctx_distill.training.callbacks.loss_guard import _global_norm

    mesh = init_device_mesh("cpu", (world_size(),))
    shards = [distribute_tensor(each, mesh, [Shard(0)]) for each in gradients]
    return {"all": float(_global_norm(list(shards))), "mixed": float(_global_norm([gradients[0], *shards[1:]]))}


@pytest.mark.ddp
def test_the_norm_of_sharded_gradients_is_that_of_the_whole(pool: Callable[[int], Any]) -> None:
    gradients = [torch.randn(5, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64), torch.ones(7).double()]
    expected = float(torch.cat([each.flatten() for each in gradients]).norm())
    for result in pool(2).run(__file__, "sharded_norm", {"gradients": gradients}):
        assert result == pytest.approx({"all": expected, "mixed": expected}, rel=1e-12)
