"""`ctx-distill check`."""

from __future__ import annotations

from pathlib import Path


def check(
    manifest: Path, /, *, out: Path | None = None, prepared: Path | None = None, workers: int | None = None
) -> int:
    """Read every image of a manifest and report what is wrong with it.

    Exit status: 0 no errors, 1 errors (warnings and notes do not count), 2 bad input.

    Args:
        manifest: CSV or Parquet manifest.
        out: Folder for the table, the page and the list of exclusions. Default: `<manifest>.check` beside it.
        prepared: Also compare the checksums of the volumes that `prepare` wrote to this folder.
        workers: Processes. Default: one per core.
    """
    print(f"reading {manifest} ...", flush=True)
    from ctx_distill.reporting.manifest_check import check_manifest

    summary, errors = check_manifest(manifest, out, prepared, workers)
    print(summary)
    return 1 if errors else 0
