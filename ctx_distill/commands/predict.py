"""`ctx-distill predict`."""

from __future__ import annotations

from pathlib import Path


def predict(
    checkpoint: Path,
    scans: Path,
    /,
    *,
    out: Path,
    saliency: list[str] | None = None,
    report: bool = False,
    device: str = "cpu",
    vocabulary: str | None = None,
    workers: int | None = None,
) -> int:
    """Predict findings, embedding, saliency and draft report of scans.

    Repeat the command to resume a stopped one. Exit status: 0 all scans read, 1 some scans were unreadable, 2 bad input.
    A research tool, not a medical device.

    Args:
        checkpoint: Run folder, or artefact of stage 3 or 4.
        scans: One scan, a folder of DICOM slices or of scans, or a manifest.
        out: Folder of the results.
        saliency: Write saliency maps of these findings as NIfTI. Without names: the three most probable of each scan.
        report: Also draft reports.
        device: `cpu`, `cuda`, ...
        vocabulary: Findings to query if the run names none. Default: `ct-rate`.
        workers: Processes. Default: on a CPU one per core for every 16 scans, else 1.
    """
    print(f"loading the model of {checkpoint} ...", flush=True)
    from ctx_distill.inference.batch import predict_scans

    summary, unreadable = predict_scans(checkpoint, scans, out, saliency, report, device, vocabulary, workers)
    print(summary)
    return 1 if unreadable else 0
