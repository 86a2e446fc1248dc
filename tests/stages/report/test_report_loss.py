"""The decoder's loss: NumPy oracle, identity, gradients, two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ranks import own_rows
from torch import Tensor, nn

from ctx_distill import distributed
from ctx_distill.stages.report.loss import IGNORE, report_loss

TARGETS = torch.tensor([[1, 2, IGNORE], [0, IGNORE, IGNORE], [3, 3, 1]])


def logits(seed: int = 0) -> Tensor:
    return torch.randn(3, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_oracle() -> None:
    x, total, count = logits().numpy(), 0.0, 0
    for i, j in np.ndindex(3, 3):
        if TARGETS[i, j] != IGNORE:
            total -= x[i, j, TARGETS[i, j]] - np.log(np.exp(x[i, j]).sum())
            count += 1
    assert report_loss(logits(), TARGETS)["total"].item() == pytest.approx(total / count, abs=1e-12)


def test_identity_sure_and_right_costs_nothing() -> None:
    sure = 100.0 * nn.functional.one_hot(TARGETS.clamp_min(0), 4).double()
    assert report_loss(sure, TARGETS)["total"].item() == pytest.approx(0, abs=1e-12)
    assert report_loss(logits(), torch.full_like(TARGETS, IGNORE))["total"].item() == 0


def test_gradients() -> None:
    assert torch.autograd.gradcheck(lambda x: report_loss(x, TARGETS, 0.1)["total"], (logits().requires_grad_(),))


def rank_of_step(x: Tensor, targets: Tensor, first: int) -> dict[str, Any]:
    mine = own_rows(len(x), first)
    head = nn.Linear(4, 4).double()
    with torch.no_grad():
        head.weight.copy_(logits(7)[0, :1].T @ logits(8)[0, :1])
        head.bias.zero_()
    model = nn.parallel.DistributedDataParallel(head) if distributed.world_size() > 1 else head
    loss = report_loss(model(x[mine]), targets[mine])["total"]
    loss.backward()
    return {"loss": loss.detach(), "grads": [p.grad for p in head.parameters()]}


@pytest.mark.ddp
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("first", [1, 2])
def test_several_ranks_equal_one(pool: Callable[[int], Any], size: int, first: int) -> None:
    arguments = {"x": logits(), "targets": TARGETS, "first": first}
    expected = rank_of_step(**arguments)
    for result in pool(size).run(__file__, "rank_of_step", arguments):
        assert torch.allclose(result["loss"], expected["loss"], atol=1e-12)
        for value, gradient in zip(result["grads"], expected["grads"], strict=True):
            assert torch.allclose(value, gradient, atol=1e-12)
