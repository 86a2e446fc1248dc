"""Runs `second_device.py` in a process of its own: torch takes a new device only before its first backward pass.

The stages on that device take many minutes and are run by hand: `make test-device`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECKS = Path(__file__).with_name("second_device.py")


def test_the_second_device() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--show-capture=no", "-m", "not slow", str(CHECKS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
