"""Fixtures of the tasks' tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HELPER = Path(__file__).parents[1] / "helpers" / "ddp.py"


@pytest.fixture(scope="session")
def pool() -> Callable[[int], Any]:
    """`pool(2).run(__file__, "function", arguments)` runs a function of a test file on two ranks."""
    if "ddp_helper" not in sys.modules:
        spec = importlib.util.spec_from_file_location("ddp_helper", HELPER)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["ddp_helper"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["ddp_helper"])
    return sys.modules["ddp_helper"].pool
