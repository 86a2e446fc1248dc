"""Runs `second_device.py` in processes of its own: torch takes a new device only before its first backward pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("second_device.py")


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param("not slow", id="device"),
        pytest.param("slow", id="stages", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_on_a_second_device(chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--show-capture=no", "-m", chosen, str(CHECKS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
