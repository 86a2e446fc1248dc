"""`ctx-distill prepare`."""

from __future__ import annotations

from pathlib import Path


def prepare(
    manifest: Path, out: Path, /, *, preset: str = "demo", workers: int | None = None, array: str | None = None
) -> None:
    """Write the volumes of a manifest once, in the form that training reads.

    Args:
        manifest: CSV or Parquet manifest of CTs.
        out: Folder to write.
        preset: Volume of a preset (`demo`, `base`, `large`, a YAML file) or of a published model (`ct-clip`, `fvlm`,
            `hlip`, `merlin`).
        workers: Processes. Default: one per core.
        array: `i/n`: every n-th image from the i-th, counted from 0. Default: this task of a SLURM array, else all.
    """
    print(f"reading {manifest} ...", flush=True)
    from ctx_distill.runs.prepare_volumes import prepare_manifest

    print(prepare_manifest(manifest, out, preset, workers, array))
