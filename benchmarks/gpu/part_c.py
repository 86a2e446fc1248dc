"""Part c: the arms of the long training, on phantoms that this machine's cores make."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from gpu.context import Context, Row
from gpu.follow import follow, rows_of
from gpu.runner import read_json, write_json

TITLE = "Long training: the method's arms on phantoms"
COLUMNS = {"macro_auroc": ("macro AUROC, val", ".3f"), "low": ("95 % from", ".3f"), "high": ("to", ".3f"), "pairs": ("pairs", "d"),
           "steps": ("steps", "d"), "seconds": ("seconds", ".0f")}  # fmt: skip


def run(context: Context) -> Iterator[Row]:
    """Yield a row per arm."""
    out = context.work / f"long-training-{context.device}-{context.scale}.json"
    if out.is_file():  # the program keeps the arms that finished, and so drops the others' rows
        write_json(out, {**read_json(out), "rows": [row for row in rows_of(out) if "error" not in row]})
    program, folder = context.repo / "benchmarks" / "long_training.py", context.work / f"long-training-{context.device}"
    command = [sys.executable, str(program), "--device", context.device, "--scale", context.scale, "--run", str(folder),
               "--out", str(out), "--limit", f"{max(1.0, context.left() - 15):.0f}"]  # fmt: skip
    if context.only:
        command += ["--arms", *context.only]
    # Status 1: some arms are not finished; the rows are those that are.
    for row in follow(command, out, rows_of, allowed=(0, 1)):
        interval = row.get("interval", {})
        yield {**row, "name": row["arm"], **{end: interval[end] for end in ("low", "high") if end in interval}}
