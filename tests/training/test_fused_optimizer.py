"""Fused optimizers on a GPU by default; a CPU, which has the same kernels, stands in for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ctx_distill.training import fused_optimizer
from ctx_distill.training.callbacks.loss_guard import _skips_on_device
from ctx_distill.training.fused_optimizer import fused_on

CPU = torch.device("cpu")


@pytest.fixture
def _a_cpu_counts_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_optimizer, "FUSED_DEVICES", ("cpu",))


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))


def groups(model: nn.Sequential) -> list[dict[str, Any]]:
    return [
        {"params": list(model[0].parameters()), "lr": 0.02, "weight_decay": 0.3},
        {"params": list(model[1].parameters()), "betas": (0.5, 0.9)},
    ]


def train(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    for _ in range(5):
        optimizer.zero_grad()
        torch.autograd.backward(model(torch.randn(3, 5, generator=draw)).square().sum())
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.usefixtures("_a_cpu_counts_as_a_gpu")
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_it_trains_the_same_weights_with_each_group_s_settings(kind: type[torch.optim.Optimizer]) -> None:
    plain_model, fused_model = layers(), layers()
    plain = kind(groups(plain_model), lr=0.1, weight_decay=0.01)  # type: ignore[call-arg]
    fused = fused_on(CPU, kind(groups(fused_model), lr=0.1, weight_decay=0.01))  # type: ignore[call-arg]
    assert not _skips_on_device(plain)
    assert _skips_on_device(fused)
    assert [group["lr"] for group in fused.param_groups] == [0.02, 0.1]
    for found, expected in zip(train(fused_model, fused), train(plain_model, plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_a_cpu_counts_as_a_gpu")
@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1),
        lambda params: torch.optim.AdamW(params, foreach=True),
        lambda params: torch.optim.AdamW(params, fused=False),
        lambda params: torch.optim.AdamW(params, differentiable=True),
    ],
)
def test_what_the_settings_say_stands(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    optimizer = make(layers().parameters())
    assert fused_on(CPU, optimizer) is optimizer


def test_a_cpu_keeps_torch_s_default() -> None:
    optimizer = torch.optim.AdamW(layers().parameters())
    assert fused_on(CPU, optimizer) is optimizer


@pytest.mark.usefixtures("_a_cpu_counts_as_a_gpu")
def test_a_state_that_was_saved_without_fused_kernels_goes_on_without_them() -> None:
    saved, model = layers(), layers()
    before = torch.optim.AdamW(saved.parameters())
    train(saved, before)
    resumed = fused_on(CPU, torch.optim.AdamW(model.parameters()))
    resumed.load_state_dict(before.state_dict())
    assert not _skips_on_device(resumed)  # so the guard leaves `found_inf` alone, which its kernels would refuse
    train(model, resumed)
