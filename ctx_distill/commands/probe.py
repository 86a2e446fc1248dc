"""`ctx-distill probe`."""

from __future__ import annotations

from pathlib import Path


def probe(
    checkpoint: Path,
    manifest: Path,
    /,
    *,
    out: Path | None = None,
    shots: tuple[str, ...] = (),
    seeds: int = 5,
    device: str = "cpu",
) -> None:
    """Fit a linear probe on frozen features, and few-shot curves.

    Args:
        checkpoint: Run folder, or artefact of stage 3 or 4.
        manifest: Manifest with label columns.
        out: Folder of the results. Default: `CHECKPOINT/probe`.
        shots: Also fit on K positives and K negatives per finding, or on K% of the training patients: `1 5 10 10% 50%`.
        seeds: Draws per number of shots.
        device: `cpu`, `cuda`, ...
    """
    print(f"loading the model of {checkpoint} ...", flush=True)
    from ctx_distill.probing import linear_probe

    print(linear_probe.probe(checkpoint, manifest, out or checkpoint / "probe", list(shots), seeds, device))
