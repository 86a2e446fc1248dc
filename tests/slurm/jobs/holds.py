"""Places where a test can hold a job's program: where FOLDER/<stage>-<place>.wanted stands, every rank writes its process
number, waits until `.go` stands, and writes as soon as a signal has come to it. FOLDER is in CTX_TEST_HOLDS."""

import os
import signal
import sys
import time
from pathlib import Path


def stage() -> str:
    """The stage that this process runs; empty where it runs none."""
    words = sys.orig_argv
    return words[words.index("ctx_distill") + 1] if "ctx_distill" in words else ""


def reach(place: str) -> None:
    """Wait here where the test wants it."""
    name = f"{stage()}-{place}"
    folder, rank = Path(os.environ["CTX_TEST_HOLDS"]), os.environ.get("SLURM_PROCID", "0")
    if not (folder / f"{name}.wanted").exists() or (folder / f"{name}.go").exists():
        return
    _write(folder / f"{name}.reached-{rank}", str(os.getpid()))
    while not (folder / f"{name}.go").exists():
        if _signalled():
            _write(folder / f"{name}.signalled-{rank}", "")
        time.sleep(0.05)


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}")
    part.write_text(text)
    part.replace(path)


def _signalled() -> bool:
    package = sys.modules.get("ctx_distill.signals")
    return bool(signal.sigpending()) or (package is not None and package.requested() is not None)
