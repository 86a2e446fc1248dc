"""Part d: the X-ray index on the GPU beside the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from gpu.context import Context, Row
from gpu.follow import follow, rows_of

TITLE = "The X-ray index on the GPU beside the CPU"
COLUMNS = {"build_s": ("build, s", ".1f"), "ms_1": ("1 query, ms", ".3f"), "ms_32": ("32, ms", ".3f"), "ms_1024": ("1,024, ms", ".2f"),
           "device_mb": ("GPU, MB", ".0f"), "recall_at_1": ("recall@1", ".3f"), "same_neighbours": ("same neighbours", ".3f")}  # fmt: skip


def run(context: Context) -> Iterator[Row]:
    """Yield a row per index and device."""
    if context.device == "cuda" and not context.faiss_gpu:
        yield {"name": "FAISS on the GPU", "skipped": "FAISS for GPUs is not there; see the notes of the report"}
        return
    out = context.work / f"faiss-{context.device}-{context.scale}.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(context.repo / "benchmarks" / "faiss_gpu.py"), "--device", context.device, "--scale", context.scale,
               "--limit", f"{context.left() - 20:.0f}", "--out", str(out)]  # fmt: skip
    for row in follow(command, out, rows_of):
        yield {**row, "name": f"{row['keys']:,} keys, {row['kind']}, {row['device']}"}
