"""A running explorer and a headless Chromium, for the tests that look at pages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def address(finished_run: Path, scratch: Path) -> Iterator[str]:
    """A running `ctx-distill serve` that shows the pool; SIGTERM ends it with status 0 and an empty scratch folder."""
    command = [sys.executable, "-m", "ctx_distill", "serve", str(finished_run), "--port", "0", "--show-reports"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "TMPDIR": str(scratch)}
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("explorer: "):
                yield line.split()[1]
                break
        else:
            raise AssertionError("it did not start")
        process.terminate()
        assert process.wait(30) == 0
        assert not list(scratch.glob("ctx-distill-explorer-*"))
    finally:
        process.kill()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    arguments = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
    arguments += ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()
