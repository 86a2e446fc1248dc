"""Fixtures that many tests share: a small embedded cohort, and a run of the whole pipeline on it."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TINY = Path(__file__).parent / "conf" / "tiny.yaml"
REAL_MINI = Path(__file__).parents[2] / "shared" / "data" / "real_mini"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    ddp_helper().forget_former_runs()


@pytest.fixture(scope="session")
def tiny_preset() -> Path:
    """A preset under which every stage takes seconds."""
    return TINY


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 phantom CT studies and 48 X-ray studies; do not write into it."""
    from ctx_distill.phantom.cohort import write_cohort

    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, ct=24, xray=48, seed=5, workers=2)
    return folder


@pytest.fixture(scope="session")
def finished_run(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of `ctx-distill all` on the cohort under the tiny preset; do not write into it."""
    from ctx_distill.commands.main import main

    run = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["all", "--data", str(cohort), "--run", str(run), "--preset", str(TINY)]) == 0
    return run


@pytest.fixture(scope="session")
def real_mini() -> Path:
    """Real CTs and radiographs beside the project, where they are."""
    if not REAL_MINI.is_dir():
        pytest.skip(f"the real scans are not here (looked for {REAL_MINI.relative_to(Path(__file__).parents[2])})")
    return REAL_MINI


def ddp_helper() -> Any:
    """Return the module `tests/helpers/ddp.py`, which no package holds."""
    if "ddp_helper" not in sys.modules:
        spec = importlib.util.spec_from_file_location("ddp_helper", Path(__file__).parent / "helpers" / "ddp.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["ddp_helper"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["ddp_helper"])
    return sys.modules["ddp_helper"]


@pytest.fixture(scope="session")
def pool() -> Callable[[int], Any]:
    """`pool(2).run(__file__, "function", arguments)` runs a function of a test file on two ranks."""
    return ddp_helper().pool
