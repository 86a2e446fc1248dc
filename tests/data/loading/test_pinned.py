"""Batches for a GPU are in page-locked memory; others are not. A fake stands for the GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.training.cached_batches import encode_in_micro_batches, on_host
from ctx_distill.types import CTBatch, XrayBatch

SPEC = VolumeSpec(spacing=(12.0, 12.0, 12.0), shape=(24, 32, 32))


def batch(rows: int = 2) -> CTBatch:
    codes = torch.arange(rows)
    return CTBatch(
        torch.rand(rows, 1, 2, 2, 2), codes, codes, ["a"] * rows, torch.ones(rows, 3), torch.rand(rows, 2, 2)
    )


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Storage addresses of the tensors that were pinned."""
    addresses: set[int] = set()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        addresses.add(copy.data_ptr())
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return addresses


@pytest.mark.parametrize(("device", "pins"), [("cuda", True), ("cpu", False), ("mps", False), (None, False)])
def test_loaders_pin_exactly_for_a_gpu(cohort: Path, device: str | None, pins: bool) -> None:
    module = CTDataModule(str(cohort / "ct.csv"), SPEC)
    if device is not None:
        fake: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
        module.trainer = fake
    assert module.loader(module.manifest, train=True).pin_memory is pins
    assert module.loader(module.manifest).pin_memory is pins


def test_every_tensor_of_a_batch_is_pinned(pinned: set[int]) -> None:
    given = batch()
    for one in (given, XrayBatch(torch.rand(2, 3, 4, 4), given.study, given.row, given.report, [(1, "gone")])):
        held = one.pin_memory()
        assert type(held) is type(one)
        for name, value in vars(one).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(held, name), value)
                assert getattr(held, name).data_ptr() in pinned
            else:
                assert getattr(held, name) == value


def test_what_a_worker_leaves_to_the_training_process_is_not_pinned(pinned: set[int]) -> None:
    given = batch()
    given.volume = torch.empty(2, 1, 2, 2, 2, device="meta")
    held = given.pin_memory()
    assert held.volume.is_meta
    assert held.row.data_ptr() in pinned


def test_micro_batches_are_copied_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[dict[str, Any]] = []
    to, empty = torch.Tensor.to, torch.empty

    def seen_to(tensor: torch.Tensor, *places: Any, **named: Any) -> torch.Tensor:
        if places and isinstance(places[0], torch.device):
            copied.append(named)
        return to(tensor, *places, **named)

    asked: list[bool] = []

    def seen_empty(*shape: Any, pin_memory: bool = False, **named: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(*shape, **named)

    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    monkeypatch.setattr(torch, "empty", seen_empty)
    held = on_host(batch(), "float16", lambda moved: moved)
    assert asked == [True]
    monkeypatch.setattr(torch.Tensor, "to", seen_to)
    encode_in_micro_batches(lambda part: (part.volume,), held, 2, [], torch.device("cpu"), torch.float32)
    assert copied == [{"non_blocking": True}]
