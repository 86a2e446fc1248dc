"""`ctx-distill clean`."""

from __future__ import annotations

from pathlib import Path


def clean(run: Path, /, *, delete: bool = False) -> None:
    """List the superseded results of a run, `*.before-N`, with size and date.

    Args:
        run: Run folder.
        delete: Delete them. Refused while another process uses the run.
    """
    from ctx_distill.runs.superseded import clean_run

    print(clean_run(run, delete=delete))
