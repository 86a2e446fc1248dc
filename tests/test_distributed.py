"""Rank, world size and the gathers, at one rank and at two (and four) gloo processes."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctx_distill import distributed
from ctx_distill.errors import InputError
from ctx_distill.signals import StopRequested

ROWS = {2: [3, 5], 4: [2, 1, 4, 1]}


class Model(nn.Module):
    """A parameter in front of the gather and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3))
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.weight, self.scale * 1


def objective(rows: Tensor, scale: Tensor) -> Tensor:
    """Depends on every pair of rows, so that a wrong gather or a wrong scale shows."""
    return (scale * rows @ rows.T).sin().mean() + scale**2


def whole(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model = Model()
    value = objective(*model(x))
    value.backward()
    return value.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def rank_of_training(x: Tensor, rows: list[int]) -> dict[str, Any]:
    start = sum(rows[: distributed.rank()])
    model = Model()
    ddp = nn.parallel.DistributedDataParallel(model)
    out, scale = ddp(x[start : start + rows[distributed.rank()]])
    value = objective(distributed.gather_with_gradient(out), scale)
    value.backward()
    return {"value": value.detach(), "grads": {name: p.grad for name, p in model.named_parameters()}}


def rank_of_gathers(rows: list[int]) -> dict[str, Any]:
    rank = distributed.rank()
    mine = torch.arange(rows[rank]) + 100 * rank
    values = mine.double().requires_grad_()
    mean = distributed.global_mean(values, (mine % 2).double())
    mean.backward()
    distributed.barrier()
    return {
        "rank": rank,
        "world": distributed.world_size(),
        "integers": distributed.gather_with_gradient(mine),
        "booleans": distributed.gather_with_gradient(mine % 2 == 0),
        "empty": distributed.gather_with_gradient(torch.ones(2 if rank == 1 else 0, 3)),
        "all_empty": distributed.gather_with_gradient(torch.ones(0, 3)),
        "objects": distributed.gather_objects([f"{rank}-{i}" for i in range(rows[rank])]),
        "mean": mean.detach(),
        "mean_grad": values.grad,
    }


def test_one_process_without_a_group() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    assert distributed.gather_with_gradient(x) is x
    assert distributed.gather_objects(["a", "b"]) == ["a", "b"]
    assert distributed.gather_row_counts(4, x.device) == [4]
    assert distributed.run_on_rank_zero(lambda: 7) == 7
    distributed.barrier()


def test_global_mean_of_one_process() -> None:
    values = torch.tensor([1.0, 2.0, 6.0])
    assert distributed.global_mean(values) == 3
    assert distributed.global_mean(values, torch.tensor([1.0, 0.0, 1.0])) == 3.5
    assert distributed.global_mean(values, torch.zeros(3)) == 0


@pytest.mark.ddp
@pytest.mark.parametrize("size", [2, 4])
def test_gradient_equals_one_process(pool: Callable[[int], Any], size: int) -> None:
    x = torch.randn(sum(ROWS[size]), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    value, grads = whole(x)
    for result in pool(size).run(__file__, "rank_of_training", {"x": x, "rows": ROWS[size]}):
        assert torch.allclose(result["value"], value, atol=1e-12)
        for name, expected in grads.items():
            assert torch.allclose(result["grads"][name], expected, atol=1e-12), name


@pytest.mark.ddp
def test_gathers_in_rank_order(pool: Callable[[int], Any]) -> None:
    expected = [0, 1, 2, 100, 101, 102, 103, 104]
    odd = [n for n in expected if n % 2]
    for rank, result in enumerate(pool(2).run(__file__, "rank_of_gathers", {"rows": ROWS[2]})):
        assert (result["rank"], result["world"]) == (rank, 2)
        assert result["integers"].tolist() == expected
        assert result["booleans"].tolist() == [n % 2 == 0 for n in expected]
        assert result["empty"].shape == (2, 3)
        assert result["all_empty"].shape == (0, 3)
        assert result["objects"] == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2", "1-3", "1-4"]
        assert result["mean"] == sum(odd) / len(odd)
        mine = expected[:3] if rank == 0 else expected[3:]
        # Summed over ranks; DDP's average takes the factor 2 off.
        assert torch.allclose(result["mean_grad"], 2 * torch.tensor([n % 2 / len(odd) for n in mine]).double())


def own_pool(size: int, backend: str = "gloo") -> Any:
    """Ranks of one test alone, which may break them."""
    spec = importlib.util.spec_from_file_location("own_ddp_helper", Path(__file__).parent / "helpers" / "ddp.py")
    assert spec is not None
    assert spec.loader is not None
    helper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helper)
    return helper.Pool(size, backend)


@pytest.mark.ddp
def test_a_failing_rank_is_an_error_here() -> None:
    own = own_pool(1)
    with pytest.raises(AssertionError, match="no attribute 'nothing'"):
        own.run(__file__, "nothing", {})
    assert all(process.poll() is not None for process in own.processes)


def rank_of_refused_tensors() -> dict[str, str]:
    """What a group with NCCL's device map says to tensors on the CPU, by collective."""
    rows = torch.ones(2, 3)
    calls: dict[str, Callable[[], Any]] = {
        "gather_with_gradient": lambda: distributed.gather_with_gradient(rows),
        "gather_row_counts": lambda: distributed.gather_row_counts(2, rows.device),
        "own_first_rows": lambda: distributed.own_first_rows(torch.arange(2)),
        "global_mean": lambda: distributed.global_mean(rows[0]),
    }
    refused = {}
    for name, call in calls.items():
        try:
            call()
        except RuntimeError as error:
            refused[name] = str(error)
    return refused


class Mixed(nn.Module):
    """Parameters and buffers of several types, of which one is no number and one is not contiguous."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 3), float(value), dtype=torch.float64).T)
        self.register_buffer("halves", torch.full((3,), value, dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(value))
        self.register_buffer("flags", torch.tensor([value == 0, True]))
        self.register_buffer("nothing", torch.empty(0))


def rank_of_host_calls() -> dict[str, Any]:
    rank = distributed.rank()
    distributed.barrier()
    module = Mixed(rank)
    distributed.copy_from_rank_zero(module)
    return {
        "weights": [value.tolist() for value in module.state_dict().values()],
        "objects": distributed.gather_objects([f"text {rank}"]),
        "flags": distributed.any_rank(rank == 1, False),
        "alone": distributed.run_on_rank_zero(lambda: "written"),
    }


@pytest.mark.ddp
def test_a_group_like_nccl_s_refuses_tensors_on_the_cpu_and_carries_objects_flags_and_barriers() -> None:
    """`cuda:gloo` has NCCL's device map. What is not a tensor must not go to a GPU, and this machine has none."""
    own = own_pool(2, "cuda:gloo")
    try:
        for refused in own.run(__file__, "rank_of_refused_tensors", {}):
            assert set(refused) == {
                "gather_with_gradient", "gather_row_counts", "own_first_rows", "global_mean",
            }  # fmt: skip
            assert all("No backend type associated with device type cpu" in told for told in refused.values())
        assert own.run(__file__, "rank_of_host_calls", {}) == [
            {
                "objects": ["text 0", "text 1"],
                "flags": [True, False],
                "alone": alone,
                "weights": [value.tolist() for value in Mixed(0).state_dict().values()],
            }
            for alone in ("written", None)
        ]
    finally:
        own.close()


def rank_of_long_work(seconds: float, limit: float, ends: str) -> list[str]:
    """Rank 0 works longer than any wait may take; how it went on this rank, and that the ranks still understand each other."""
    first = distributed.gather_objects([os.getpid()])[0]
    every, distributed.ALIVE_EVERY_S = distributed.ALIVE_EVERY_S, limit / 10
    longest, distributed.ALIVE_LIMIT = distributed.ALIVE_LIMIT, timedelta(seconds=limit)

    def work() -> str:
        time.sleep(seconds)
        if ends == "dies":
            os._exit(3)
        if ends == "stands still":
            os.kill(os.getpid(), signal.SIGSTOP)
        if ends:
            raise {"InputError": InputError, "StopRequested": StopRequested, "KeyError": KeyError}[ends]("no room")
        return "written"

    try:
        went = str(distributed.run_on_rank_zero(work))
    except (InputError, StopRequested, KeyError, RuntimeError) as error:
        if ends in ("dies", "stands still"):
            os.kill(first, signal.SIGKILL)
            raise
        went = f"{type(error).__name__}: {error}"
    finally:
        distributed.ALIVE_EVERY_S, distributed.ALIVE_LIMIT = every, longest
    return distributed.gather_objects([went])


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ("", ["written", "None"]),
        ("InputError", ["InputError: no room"] * 2),
        ("StopRequested", ["StopRequested: no room"] * 2),
        ("KeyError", ["KeyError: 'no room'", "RuntimeError: rank 0 failed with KeyError: 'no room'"]),
    ],
)
def test_work_of_rank_zero_may_take_longer_than_any_wait(
    pool: Callable[[int], Any], ends: str, expected: list[str]
) -> None:
    arguments = {"seconds": 2.0, "limit": 1.0, "ends": ends}
    assert pool(2).run(__file__, "rank_of_long_work", arguments) == [expected, expected]


@pytest.mark.ddp
@pytest.mark.parametrize("ends", ["dies", "stands still"])
def test_a_rank_zero_that_is_gone_ends_those_that_wait_for_it(ends: str) -> None:
    arguments = {"seconds": 0.2, "limit": 1.0, "ends": ends}
    with pytest.raises(AssertionError) as broken:
        own_pool(2).run(__file__, "rank_of_long_work", arguments)
    first, second = str(broken.value).split("\nrank 1: ")
    assert first == "rank 0: ended"
    assert "in _wait_for_rank_zero" in second
    assert "RuntimeError" in second
