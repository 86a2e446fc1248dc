"""Rank, world size and the gathers, at one rank and at two (and four) gloo processes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctx_distill import distributed

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
    assert distributed.gather_row_counts(4) == [4]
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


@pytest.mark.ddp
def test_a_failing_rank_is_an_error_here() -> None:
    spec = importlib.util.spec_from_file_location("own_ddp_helper", Path(__file__).parent / "helpers" / "ddp.py")
    assert spec is not None
    assert spec.loader is not None
    helper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helper)
    own = helper.Pool(1)
    with pytest.raises(AssertionError, match="no attribute 'nothing'"):
        own.run(__file__, "nothing", {})
    assert all(process.poll() is not None for process in own.processes)
