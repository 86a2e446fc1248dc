"""Part c: the arms of the long training, on phantoms that this machine's cores make."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from gpu.context import Context, Row
from gpu.follow import follow, rows_of

TITLE = "Long training: the method's arms on phantoms"
COLUMNS = {"macro_auroc": ("macro AUROC, val", ".3f"), "low": ("95 % from", ".3f"), "high": ("to", ".3f"), "pairs": ("pairs", "d"),
           "steps": ("steps", "d"), "seconds": ("seconds", ".0f")}  # fmt: skip


def run(context: Context) -> Iterator[Row]:
    """Yield a row per arm."""
    out = context.work / f"long-training-{context.device}-{context.scale}.json"
    command = [sys.executable, str(context.repo / "benchmarks" / "long_training.py"), "--device", context.device, "--scale", context.scale,
               "--limit", f"{context.left() - 10:.0f}", "--run", str(context.work / f"long-training-{context.device}"), "--out", str(out)]  # fmt: skip
    for row in rows_of(out) if out.is_file() else []:
        yield named(row)
    # Status 1: some arms are not finished; the rows are those that are.
    for row in follow(command, out, rows_of, allowed=(0, 1)):
        yield named(row)


def named(row: Row) -> Row:
    """The arm's row with a name, and the interval's ends as columns."""
    interval = row.get("interval", {})
    return {
        **row,
        "name": row.get("title", row["arm"]),
        **{end: interval[end] for end in ("low", "high") if end in interval},
    }
