"""`ctx-distill phantom`."""

from __future__ import annotations

from pathlib import Path


def phantom(out: Path, /, *, ct: int = 480, xray: int = 1000, seed: int = 0, workers: int | None = None) -> None:
    """Write the embedded cohort: synthetic chests with known findings.

    Args:
        out: Folder to write.
        ct: CT studies.
        xray: X-ray studies.
        seed: The same seed writes the same bytes.
        workers: Processes. Default: one per core.
    """
    print(f"writing {ct} CT and {xray} X-ray studies to {out} ...", flush=True)
    from ctx_distill.phantom.cohort import write_cohort

    write_cohort(out, ct, xray, seed, workers)
