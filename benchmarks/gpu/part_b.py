"""Part b: `make bench-train`, on the machine's GPU or, in the rehearsal, the same rows of tiny encoders on a CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import fields

import train
from gpu.context import Context, Row, Target

TITLE = "Speed of stages 2 and 3 beside plain loops"
COLUMNS = {
    "volumes_s": ("volumes/s", ".2f"), "step_s": ("step, s", ".3f"), "batch": ("volumes per step", "d"),
    "wait_share": ("wait", ".3f"), "lookup_share": ("lookup", ".4f"), "memory_gb": ("peak, GB", ".1f"),
    "utilisation": ("utilisation", ".3f"), "row_s": ("row, s", ".0f"),
}  # fmt: skip
SETTINGS = {"group", *(field.name for field in fields(train.Job) if field.name not in ("kind", "batch"))}
"""Not shown of rows that are no training."""
SMALL = [
    "--shapes", "16x32x32", "--encoders", "vit_tiny", "resnet_tiny", "--patch", "8", "--batch", "2", "--warmup", "2", "--steps", "3",
    "--large-batch", "8", "--workers", "2", "--threads", "1", "--index-rows", "500", "--embed-dim", "64",
]  # fmt: skip


def run(context: Context) -> Iterator[Row]:
    """Yield the rows of `make bench-train`; those of the rehearsal are the rows of a GPU at tiny sizes, compiled too."""
    words = ["--device", context.device, "--gpu-rows", "--data", str(context.work / f"train-data-{context.scale}")]
    options = train.parse(words if context.full else [*words, *SMALL])
    options.only = list(context.only) or None
    options.skip = context.finished
    for row in train.measured(options, time.monotonic() + context.left() - 3):
        settings = SETTINGS if row["kind"] in ("data", "ceilings") else {"group"}
        yield {**{key: value for key, value in row.items() if key not in settings}, "name": train.full_name(row)}


def targets(rows: list[Row]) -> list[Target]:
    """What issue 16 asks of one H100 or H200."""
    return [Target(*check) for check in train.checks(rows)]
