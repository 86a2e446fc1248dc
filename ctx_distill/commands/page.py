"""`ctx-distill page`."""

from __future__ import annotations

from pathlib import Path


def page(*, run: Path = Path("runs/demo")) -> None:
    """Write `RUN/index.html`, the page of a run.

    Args:
        run: Run folder.
    """
    print(f"writing the page of {run} ...", flush=True)
    from ctx_distill.reporting.run_page import build_page

    print(build_page(run))
