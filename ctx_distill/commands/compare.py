"""`ctx-distill compare`."""

from __future__ import annotations

from pathlib import Path


def compare(*runs: Path, out: Path = Path("compare.html")) -> None:
    """Write one page that compares 2 to 6 runs, with differences paired by patient.

    Args:
        runs: Run folders. The first is the baseline.
        out: HTML file to write.
    """
    print(f"comparing {len(runs)} runs ...", flush=True)
    from ctx_distill.reporting.compare_page import build_compare_page

    print(build_compare_page(list(runs), out))
