"""Where the host waits for the device in training steps: counted on a GPU by torch itself, without one by `pretend_device`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from pretend_device import PretendDevice, package_function

from ctx_distill.commands.main import main


@contextmanager
def cuda_waits() -> Iterator[Counter[str]]:
    """Count by function of the package what `torch.cuda.set_sync_debug_mode` warns of."""
    found: Counter[str] = Counter()
    before = warnings.showwarning, torch.cuda.get_sync_debug_mode()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found[package_function()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before[1])
            warnings.showwarning = before[0]


def waits_of_a_stage(
    arguments: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch, first: int = 1
) -> tuple[Counter[str], int]:
    """Run a stage and count the waits of its training steps.

    Args:
        arguments: of `ctx-distill`.
        device: a GPU, or the CPU where `pretend_device` takes its place: then the preset must name it.
        monkeypatch: of the test.
        first: training step from which on waits are counted; what a stage does once is no matter.

    Returns:
        Waits by function of the package, and the number of steps counted. Reading and logging are part of a step.
    """
    total: Counter[str] = Counter()
    steps = 0
    advance = _TrainingEpochLoop.advance
    pretend = PretendDevice() if device.type == "cpu" else None

    def counted(self: Any, *given: Any, **more: Any) -> None:
        nonlocal steps
        if self.global_step < first:
            advance(self, *given, **more)
            return
        steps += 1
        if pretend is None:
            with cuda_waits() as found:
                advance(self, *given, **more)
            total.update(found)
        else:
            pretend.syncs.clear()
            advance(self, *given, **more)
            for (where, _), count in pretend.syncs.items():
                total[where] += count

    monkeypatch.setattr(_TrainingEpochLoop, "advance", counted)
    if pretend is None:
        assert main(arguments) == 0
    else:
        with pretend:
            assert main(arguments) == 0
    return total, steps


def waits_in_a_process(arguments: list[str]) -> tuple[Counter[str], int]:
    """`waits_of_a_stage` on the pretended device, in a process of its own: torch takes it only before its first backward pass."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found, steps = json.loads(done.stdout.splitlines()[-1])
    return Counter(found), steps


def pretend_preset(preset: Path, folder: Path) -> Path:
    """The preset on the device `pretend`, in float32 (autocast casts nothing there)."""
    import yaml

    layers = yaml.safe_load(preset.read_text())
    strategy = {"class_path": "lightning.pytorch.strategies.SingleDeviceStrategy", "init_args": {"device": "pretend:0"}}
    layers["all"]["trainer"] |= {"accelerator": "pretend", "precision": "32-true", "strategy": strategy}
    path = folder / "pretend.yaml"
    path.write_text(yaml.safe_dump(layers))
    return path


if __name__ == "__main__":
    print(json.dumps(waits_of_a_stage(sys.argv[1:], torch.device("cpu"), pytest.MonkeyPatch())))
