"""The pretended accelerator of the two-rank tests refuses what a GPU and NCCL refuse, and nothing else."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn


@pytest.fixture(scope="module")
def accelerator() -> Any:
    spec = importlib.util.spec_from_file_location("accelerator", Path(__file__).parent / "helpers" / "accelerator.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on(accelerator: Any) -> Iterator[Any]:
    with accelerator.Functions(), accelerator.Operations():
        yield accelerator


def test_a_module_and_what_it_computes_are_on_the_device_in_backward_too(on: Any) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).to(on.DEVICE)
    x = torch.ones(2, 3)
    y = module(x.to(on.DEVICE))
    y.square().sum().backward()
    assert x.device == torch.device("cpu")
    for tensor in (*module.parameters(), *(p.grad for p in module.parameters()), y, y[0], y.detach(), y.new_zeros(1)):
        assert tensor.device == on.DEVICE
    assert torch.arange(2, device=y.device).device == on.DEVICE
    assert y.cpu().device == y.to("cpu").device == torch.device("cpu")
    module.cpu()
    assert next(module.parameters()).device == torch.device("cpu")
    assert torch.equal(module(x), y.cpu())


def test_copies_stay_where_they_are(on: Any) -> None:
    there = torch.ones(2).to(on.DEVICE)
    assert torch.zeros(2).copy_(there).device == torch.device("cpu")
    assert there.copy_(torch.zeros(2)).device == on.DEVICE


def test_collectives_and_numpy_refuse_the_wrong_device(on: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="copy it to the host"):
        torch.ones(2).to(on.DEVICE).numpy()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        reduce = on.checked(dist.all_reduce)
        reduce(torch.ones(2).to(on.DEVICE))
        host = dist.new_group(backend="gloo")
        reduce(torch.ones(2), group=host)
        with pytest.raises(RuntimeError, match="on the host was given to the accelerator's"):
            reduce(torch.ones(2))
        with pytest.raises(RuntimeError, match="on the accelerator was given to the host's"):
            reduce(torch.ones(2).to(on.DEVICE), group=host)
    finally:
        dist.destroy_process_group()
