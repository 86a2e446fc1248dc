"""The device of these tests: the GPU, or in a rehearsal (CTX_TEST_DEVICE=cpu) the CPU, where the same code runs.

`CTX_TEST_DEVICE=cpu python -m pytest -m gpu tests/gpu` shows on a machine without a GPU that the tests themselves work: bf16 is
the CPU's, gloo takes NCCL's place, and memory is counted by what autograd keeps.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

NAME = os.environ.get("CTX_TEST_DEVICE", "cuda")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests compute; skips where there is no GPU and no rehearsal was asked for."""
    if NAME == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False; CTX_TEST_DEVICE=cpu rehearses")
    return torch.device(NAME)


@pytest.fixture(scope="session")
def backend(device: torch.device) -> str:
    """The process group's backend on this device."""
    return "nccl" if device.type == "cuda" else "gloo"


@pytest.fixture(scope="session")
def bf16_preset(device: torch.device, tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset on the device, in bf16, with DataLoader workers and augmentation."""
    preset = yaml.safe_load(tiny_preset.read_text())
    preset["all"]["trainer"] |= {"accelerator": "gpu" if device.type == "cuda" else "cpu", "precision": "bf16-mixed"}
    for group in ("ct", "xray"):
        preset[group]["data"]["init_args"]["num_workers"] = 2
    for stage in ("distill", "align"):
        preset[stage]["model"]["init_args"]["augmentation"] = {"shift": 0.05, "contrast": 0.05, "noise": 0.02}
    path = tmp_path_factory.mktemp("preset") / "bf16.yaml"
    path.write_text(yaml.safe_dump(preset))
    return path


@pytest.fixture
def peak_bytes(device: torch.device) -> Callable[[Callable[[], Any]], int]:
    """`peak_bytes(step)`: memory that a step adds at its peak; in a rehearsal what autograd keeps for backward."""

    def measure(step: Callable[[], Any]) -> int:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            return torch.cuda.max_memory_allocated() - before
        kept: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            step()
        return sum(kept.values())

    return measure
