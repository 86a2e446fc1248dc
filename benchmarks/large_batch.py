"""What a large contrastive batch needs: cached gradients against the plain step, and chunked logits.

    make bench-large-batch          (or: python benchmarks/large_batch.py)

Every line is measured in a process of its own. Memory is what one forward and backward adds to the process with its
model and inputs in it: the peak of the resident set (Linux), or of what torch allocated on a GPU, where volumes wait on
the host. Seconds are those of the clock on a GPU, else of the CPU: other work on the machine does not show in them.
Volumes are random, of the demo preset's size; reports are random sentences.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEED = 0
SHAPE = (40, 56, 56)
MICRO_BATCH = 16
PLAIN = (64, 128, 256)
CACHED = (256, 1024)
LOSS = {"rows": 32768, "dim": 512, "chunk": 256}
STATUS = Path("/proc/self/status")


def resident(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (the peak) of this process in MB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(step: Callable[[], Any]) -> dict[str, float]:
    """Peak of memory in MB over that before the step; the step's seconds (see the module), and those of the clock."""
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        ctypes.CDLL(None).malloc_trim(0)  # freed blocks that the step would fill again must not hide what it needs
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = resident("VmRSS")
    start, work = time.perf_counter(), time.process_time()
    step()
    if cuda:
        torch.cuda.synchronize()
    clock, work = time.perf_counter() - start, time.process_time() - work
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident("VmHWM")
    return {"megabytes": peak - before, "seconds": clock if cuda else work, "clock": clock}


def measure_step(rows: int, micro_batch: int | None) -> dict[str, float]:
    """One step of stage 3 on `rows` volumes, all at once or in micro-batches."""
    import torch

    from ctx_distill.losses.contrastive import contrastive_loss
    from ctx_distill.models.ct_encoder import ResNet3D
    from ctx_distill.models.dual_encoder import DualEncoder
    from ctx_distill.models.text_encoder import BertTextEncoder
    from ctx_distill.training.cached_batches import encode_in_micro_batches
    from ctx_distill.types import CTBatch

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    draw = random.Random(SEED)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sentences = [f"There is a {size} {side} {what}." for size in ("small", "large") for side in ("left", "right")
                 for what in ("effusion", "nodule", "pneumothorax", "consolidation")]  # fmt: skip
    reports = [" ".join(draw.sample(sentences, 4)) for _ in range(rows)]
    with tempfile.TemporaryDirectory() as folder:
        text = BertTextEncoder.from_scratch(sentences, Path(folder), vocab_size=200)
    model = DualEncoder(ResNet3D("small"), text).to(device)
    batch = CTBatch(torch.rand(rows, 1, *SHAPE) * 2 - 1, torch.arange(rows), torch.arange(rows), reports)

    def encode(part: CTBatch) -> tuple[torch.Tensor, ...]:
        return model.encode_volume(part.volume)[0], model.encode_text(part.report)

    def step(batch: CTBatch) -> None:
        image, text = encode_in_micro_batches(
            encode, batch, micro_batch or rows, model.parameters(), device, torch.float32
        )
        torch.autograd.backward(contrastive_loss(image, text, model.logit_scale.exp())["total"])

    step(CTBatch(batch.volume[:2], batch.study[:2], batch.row[:2], reports[:2]))
    model.zero_grad()
    result = measure(lambda: step(batch))
    result["gradient"] = float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())
    return result


def measure_loss(rows: int, dim: int, chunk: int | None) -> dict[str, float]:
    """Forward and backward of the loss, with the studies' targets."""
    import torch
    import torch.nn.functional as F

    from ctx_distill.losses.contrastive import contrastive_loss

    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def inputs(rows: int) -> list[torch.Tensor]:
        return [F.normalize(torch.randn(rows, dim, device=device), dim=-1).requires_grad_() for _ in range(2)]

    def step(image: torch.Tensor, text: torch.Tensor) -> None:
        study = torch.arange(len(image), device=device) // 2
        torch.autograd.backward(contrastive_loss(image, text, 20.0, study=study, chunk=chunk)["total"])

    step(*inputs(2 * (chunk or 64)))
    features = inputs(rows)
    return measure(lambda: step(*features))


def in_its_own_process(what: str, **arguments: Any) -> dict[str, float]:
    """Run a `measure_` function in a fresh process."""
    command = [sys.executable, __file__, "--measure", what, json.dumps(arguments)]
    # Threads that spin while they wait would count as work.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    result: dict[str, float] = json.loads(printed.splitlines()[-1])
    return result


def report() -> None:
    """Measure everything and print it as it comes."""
    import torch

    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores, no GPU"
    print(f"{machine}, torch {torch.__version__}, seed {SEED}\n", flush=True)
    volume = " x ".join(map(str, SHAPE))
    print(f"Stage-3 step, ResNet3D small and a 2-layer BERT, volumes of {volume}, float32, one thread")
    print(f"{'volumes':>8}  {'step':<24}{'peak MB':>9}{'seconds':>9}{'|gradient|':>12}", flush=True)
    seconds: dict[tuple[str, int], float] = {}
    for name, sizes, micro_batch in (("plain", PLAIN, None), ("cached", CACHED, MICRO_BATCH)):
        for rows in sizes:
            found = in_its_own_process("step", rows=rows, micro_batch=micro_batch)
            seconds[name, rows] = found["seconds"]
            shown = f"cached, micro-batch {micro_batch}" if micro_batch else "plain"
            print(f"{rows:>8}  {shown:<24}{found['megabytes']:>9.0f}{found['seconds']:>9.1f}"
                  f"{found['gradient']:>12.6f}", flush=True)  # fmt: skip
    rows = max(set(PLAIN) & set(CACHED))
    print(f"time, cached / plain at {rows} volumes: {seconds['cached', rows] / seconds['plain', rows]:.2f}\n")

    rows, dim, chunk = LOSS["rows"], LOSS["dim"], LOSS["chunk"]
    print(
        f"InfoNCE of {rows:,} x {rows:,} (D = {dim}, float32), forward and backward, {chunk} rows of logits at a time"
    )
    found = in_its_own_process("loss", **LOSS)
    print(f"peak {found['megabytes']:.0f} MB, {found['seconds']:.0f} s ({found['clock']:.0f} s by the clock); one matrix of all logits would be"
          f" {rows * rows * 4 / 2**20:,.0f} MB")  # fmt: skip


def main() -> None:
    """Print the report, or, as a child of it, one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "JSON"), help="step or loss, with its arguments")
    given = parser.parse_args()
    if given.measure is None:
        report()
        return
    what, arguments = given.measure
    measures: dict[str, Callable[..., dict[str, float]]] = {"step": measure_step, "loss": measure_loss}
    print(json.dumps(measures[what](**json.loads(arguments))))


if __name__ == "__main__":
    main()
