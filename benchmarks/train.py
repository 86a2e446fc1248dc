"""Speed of stages 2 and 3 beside plain loops: `make bench-train` (ARGS="--help" for sizes).

`stage 2` and `stage 3` are the project's tasks under their trainer, fed from the prepared volumes, stage 2 looking up live
in a synthetic index; `plain` is the same model and open_clip's ClipLoss in a short loop, its volumes already on the
device. `utilisation` is the encoder's operations (forward and backward, each multiplication and addition, nothing that is
computed twice) over the fastest of large matrix products in the same process. `wait`: from the end of a batch to the start
of the next, reading and copying to the device.

On a GPU the rows of one encoder and shape share a process, so that torch is imported once; where a row ends the process
(not where it only runs out of memory), the next one starts another. The rows are written as they end, most valuable
first, and none starts after `--limit` seconds. Without a GPU every row has a process of its own, for its memory, and the
default is a small set of rows, one thread and one step each, in seconds of CPU time: they show that everything runs, not
how fast a GPU is.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from train_flops import encoder_of, kept_bytes
from train_steps import Job, device_here, measure

OUT = Path(__file__).parents[1] / "runs" / "bench"
SHAPES = [(96, 192, 192), (112, 256, 352)]
BATCHES = {SHAPES[0]: (16, 8, 16), SHAPES[1]: (4, 8, 8)}
"""Of each shape on a GPU: volumes per step, steps of the first epoch, which warms up, and steps after it."""
FP32_SHARE, FP32_STEPS = 4, 3
"""The plain fp32 loop is some ten times slower: a quarter of the batch, and so many steps after one."""
LARGE_BATCH = 1024
LARGE_BATCH_LIMIT = 60e9
"""Bytes of device memory that a global batch of 1,024 volumes may take (issue 5)."""
LONGEST_ROW = 240.0
"""Seconds after which a row on a GPU counts as hung."""


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """The rows, most valuable first; on a CPU those that are compared next to each other."""
    groups = [group_of(options, encoder, shape) for shape in options.shapes for encoder in options.encoders]
    return [job for group in groups for job in group]


def group_of(options: argparse.Namespace, encoder: str, shape: tuple[int, int, int]) -> list[Job]:
    """The rows of one encoder and shape, which share a process on a GPU."""
    batch, warmup, steps = BATCHES.get(shape, BATCHES[SHAPES[0]]) if options.gpu else (1, 1, 1)
    batch, warmup, steps = options.batch or batch, options.warmup or warmup, options.steps or steps
    vit, bf16 = encoder.startswith("vit"), "bf16-mixed"
    common: dict[str, Any] = {
        "encoder": encoder, "shape": shape, "patch": options.patch, "batch": batch, "warmup": warmup, "steps": steps,
        "workers": options.workers, "data": str(options.data), "manifest": "", "checkpointing": options.checkpointing,
        "epoch_steps": warmup if options.gpu else None,
    }  # fmt: skip
    fast = {**common, "compile": options.compile, "precision": bf16 if options.gpu else "32-true"}
    if not options.gpu:
        plain = ["32-true", bf16] if vit else ["32-true"]
        return [*(Job(kind=kind, **fast) for kind in ("distill", "align")),
                *(Job(kind="plain", precision=each, **common) for each in plain)]  # fmt: skip
    alone = {**common, "epoch_steps": None, "warmup": 2}
    slow = {**alone, "batch": max(1, batch // FP32_SHARE), "warmup": 1, "steps": min(steps, FP32_STEPS)}
    rows = [Job(kind="align", **fast)]
    if not vit:
        rows.append(Job(kind="plain", precision=bf16, compile=options.compile, **alone))
    rows += [Job(kind="plain", precision="32-true", **slow), Job(kind="distill", **fast)]
    if vit and shape == options.shapes[0]:
        rows.insert(0, Job(kind="ceilings", precision=bf16, **common))
        many = {**alone, "batch": options.large_batch, "warmup": 0, "steps": 1}
        rows.append(
            Job(
                kind="cached", precision=bf16, compile=options.compile, micro_batch=options.micro_batch or batch, **many
            )
        )
    return [*rows, Job(kind="plain", precision=bf16, **alone)]


def volumes_of(options: argparse.Namespace) -> dict[tuple[int, int, int], int]:
    """CTs that are prepared in each shape: those of an epoch."""
    needed: dict[tuple[int, int, int], int] = {}
    for job in jobs_of(options):
        if job.kind in ("distill", "align"):
            rows = job.batch * (job.epoch_steps or job.warmup + job.steps)
            needed[job.shape] = max(needed.get(job.shape, 0), rows)
    return needed


def name_of(job: Job) -> str:
    """A row's name."""
    if job.kind == "ceilings":
        return "ceilings of the device"
    kinds = {"distill": "stage 2", "align": "stage 3", "plain": "plain",
             "cached": f"stage 3, {job.batch:,} volumes, {job.micro_batch} at once"}  # fmt: skip
    traits = [job.precision.removesuffix("-mixed").replace("32-true", "fp32")]
    traits += ["compiled"] * job.compile + ["checkpointed"] * job.checkpointing
    return f"{kinds[job.kind]}, {', '.join(traits)}"


class Worker:
    """A process that measures one row after another: jobs go in and results come out as lines of JSON."""

    def __init__(self, threads: int, device: str) -> None:
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", **hidden}  # fmt: skip
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            text=True, env=environment,
        )  # fmt: skip

    def measure(self, job: Job, seconds: float | None) -> dict[str, Any]:
        """The row, or `error`: what went wrong. A process that did not answer is ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(job.to_json()) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"error": self.last_words()}
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        if not ready:
            self.close()
            return {"error": f"stopped: no result within {seconds:.0f} s"}
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            return {"error": self.last_words()}
        row: dict[str, Any] = json.loads(line)
        return row

    @property
    def alive(self) -> bool:
        """Whether it can take another row."""
        return self.process.poll() is None

    def last_words(self) -> str:
        """The last line of its standard error, with how it ended."""
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or ["no message"]
        return f"{lines[-1][:300]} (exit status {self.process.poll()})"

    def close(self) -> None:
        """End it."""
        if self.process.stdin is not None and self.alive:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                stream.close()


def serve() -> None:
    """A worker: results go to the real standard output, whatever else is printed to the standard error."""
    import torch

    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            row = measure(Job.from_json(json.loads(line)))
        except torch.OutOfMemoryError as error:
            row = {"error": f"out of memory: {str(error).splitlines()[0][:200]}"}
        except Exception as error:
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(row), file=results, flush=True)


def full_name(row: dict[str, Any]) -> str:
    """Encoder, shape and name of a row."""
    return f"{row['group']}: {row['name']}" if "group" in row else str(row["name"])


def measured(options: argparse.Namespace, deadline: float | None) -> Iterator[dict[str, Any]]:
    """Make the data and yield the rows as they end.

    Args:
        options: of the command line.
        deadline: `time.monotonic()` after which a row is skipped; None: all are run.
    """
    from train_data import make_data

    jobs = jobs_of(options)
    options.data.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    manifests = make_data(options.data, volumes_of(options), options.index_rows, options.embed_dim, os.cpu_count())
    if deadline is not None:
        yield {"name": "data", "kind": "data", "volumes": max(volumes_of(options).values()), "index_rows": options.index_rows,
               "seconds": time.monotonic() - began}  # fmt: skip
    worker: Worker | None = None
    group = None
    try:
        for job in jobs:
            job = replace(job, manifest=str(manifests[job.shape]))
            row = {**job.to_json(), "name": name_of(job), "group": f"{job.encoder}, {' x '.join(map(str, job.shape))}"}
            del row["data"], row["manifest"]
            if full_name(row) in options.skip or not any(text in full_name(row) for text in options.only or [""]):
                continue
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left < 15:
                yield {**row, "skipped": "no time left"}
                continue
            if worker is not None and (group != row["group"] or not worker.alive or not options.gpu):
                worker.close()
                worker = None
            group = row["group"]
            worker = worker or Worker(options.threads, options.device)
            limit = left if options.device == "cpu" else min(LONGEST_ROW, left or LONGEST_ROW)
            yield {**row, **worker.measure(job, limit)}
    finally:
        if worker is not None:
            worker.close()


def estimate(encoder: str, shape: tuple[int, int, int], patch: int, micro_batch: int) -> dict[str, float]:
    """Device bytes of a step of 1,024 volumes in micro-batches, calculated: see docs/scaling.md."""
    import torch

    with torch.device("meta"):
        model = encoder_of(encoder, shape, patch)
    weights = sum(p.numel() for p in model.parameters())
    kept = kept_bytes(model, shape)
    parts = {
        "weights, gradients, AdamW in float32": 16.0 * weights,
        "weights cast to bfloat16": 2.0 * weights,
        "activations of a micro-batch": float(kept * micro_batch),
        "volumes of a micro-batch": 4.0 * micro_batch * shape[0] * shape[1] * shape[2],
        "features and logits of the batch": 4.0 * LARGE_BATCH * (4 * 512 + 4 * LARGE_BATCH),
    }
    return {**parts, "all": sum(parts.values())}


def targets(rows: list[dict[str, Any]]) -> list[str]:
    """What is to be reached on a GPU, a line each."""
    return [f"{what}: {value:.3f}, {'reached' if good else 'NOT reached'}" for what, value, good in checks(rows)]


def checks(rows: list[dict[str, Any]]) -> list[tuple[str, float, bool]]:
    """What issues 5 and 16 ask of one H100 or H200: row and bound in words, the value, whether it is within the bound."""

    def find(like: dict[str, Any], **other: Any) -> dict[str, Any] | None:
        same = {"encoder": like["encoder"], "shape": like["shape"], "kind": "plain", **other}
        return next(
            (r for r in rows if not {"error", "skipped"} & r.keys() and all(r.get(k) == v for k, v in same.items())),
            None,
        )

    result: list[tuple[str, float, bool]] = []
    for row in rows:
        if {"error", "skipped"} & row.keys() or row["kind"] not in ("distill", "align", "cached"):
            continue
        checked: list[tuple[str, float, bool]] = []
        if row["kind"] in ("distill", "align"):
            lost = row["wait_share"] + row["lookup_share"]
            checked.append(("data and lookup under .02 of the step", lost, lost < 0.02))
            if row["encoder"].startswith("vit"):
                checked.append(("utilisation .45 or more", row["utilisation"], row["utilisation"] >= 0.45))
            if fp32 := find(row, precision="32-true"):
                factor = row["volumes_s"] / fp32["volumes_s"]
                checked.append(("2 or more times the plain fp32 loop", factor, factor >= 2))
            if not row["encoder"].startswith("vit") and (plain := find(row, precision="bf16-mixed", compile=True)):
                share = row["volumes_s"] / plain["volumes_s"]
                checked.append((".95 or more of the compiled plain loop", share, share >= 0.95))
        if row["kind"] == "cached":
            under = row["memory_gb"] * 1e9 < LARGE_BATCH_LIMIT
            checked.append((f"{row.get('batch', LARGE_BATCH):,} volumes in under 60 GB", row["memory_gb"], under))
        result += [(f"{full_name(row)}: {what}", value, good) for what, value, good in checked]
    return result


def shapes_of(text: str) -> tuple[int, int, int]:
    """`96x192x192`."""
    depth, rows, columns = (int(edge) for edge in text.split("x"))
    return depth, rows, columns


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, with this machine's defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device_here().type, help="cpu: leave a GPU alone")
    parser.add_argument(
        "--gpu-rows", action=argparse.BooleanOptionalAction, dest="gpu", help="the rows of a GPU, on a CPU too"
    )
    parser.add_argument("--shapes", nargs="+", type=shapes_of)
    parser.add_argument("--encoders", nargs="+", default=["vit_b", "resnet50"])
    parser.add_argument("--patch", type=int, help="edge of a ViT's token; 8 on a GPU, 16 without")
    parser.add_argument("--batch", type=int, help="volumes per step; by default that of the shape")
    parser.add_argument("--warmup", type=int, help="steps that do not count")
    parser.add_argument("--steps", type=int, help="steps that do")
    parser.add_argument(
        "--micro-batch", type=int, help="volumes at once of the large batch; by default the shape's batch"
    )
    parser.add_argument("--large-batch", type=int, default=LARGE_BATCH)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--index-rows", type=int)
    parser.add_argument("--embed-dim", type=int, default=512)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="rows whose name (`vit_b, 96 x 192 x 192: stage 2, ...`) has it"
    )
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="after which no row starts")
    parser.add_argument("--data", type=Path, default=OUT / "train-data")
    parser.add_argument("--out", type=Path, default=OUT / "train.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(skip=frozenset())
    options = parser.parse_args(arguments)
    if options.gpu is None:
        options.gpu = options.device == "cuda"
    defaults = {
        "shapes": SHAPES,
        "patch": 8,
        "workers": 8,
        "threads": os.cpu_count() or 1,
        "index_rows": 300_000,
        "compile": True,
    }
    if not options.gpu:
        defaults = {
            "shapes": SHAPES[:1],
            "patch": 16,
            "workers": 0,
            "threads": 1,
            "index_rows": 20_000,
            "compile": False,
        }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def line_of(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    if told := row.get("error") or row.get("skipped"):
        return f"{row['name']:<44}{told}"
    if row["kind"] == "data":
        return f"{row['name']:<44}{row['seconds']:.1f} s"
    if row["kind"] == "ceilings":
        facts = ", ".join(f"{name} {value / 1e12:.2f}e12" for name, value in row.items() if name.endswith("_s"))
        return f"{row['name']:<44}{facts}"
    return (f"{row['name']:<44}{row['volumes_s']:>10.3f}{row['step_s']:>9.2f}{row['wait_share']:>7.3f}{row['lookup_share']:>8.4f}"
            f"{row['memory_gb']:>9.2f}{row['volumes_s'] * row['flops'] / 1e12:>9.3f}{row['matmul_flops_s'] / 1e12:>8.3f}"
            f"{row['utilisation']:>7.3f}")  # fmt: skip


def main() -> None:
    """Print the table and write it, or, as a worker, measure rows."""
    options = parse()
    if options.worker:
        serve()
        return
    import torch

    began = time.monotonic()
    machine = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"CPU seconds, {options.threads} thread, no GPU"
    )
    print(f"{machine}, torch {torch.__version__}, seed 0; tokens of {options.patch}^3 voxels, index of "
          f"{options.index_rows:,} x {options.embed_dim}; median of the steps after the warm-up")  # fmt: skip
    print(
        f"{'':<44}{'volumes/s':>10}{'step s':>9}{'wait':>7}{'lookup':>8}{'peak GB':>9}{'TFLOP/s':>9}{'matmul':>8}{'util.':>7}"
    )
    estimates = []
    for shape in options.shapes:
        for encoder in options.encoders:
            micro = options.micro_batch or (BATCHES.get(shape, BATCHES[SHAPES[0]])[0] if options.gpu else 8)
            parts = estimate(encoder, shape, options.patch, micro)
            estimates.append({"encoder": encoder, "shape": shape, "micro_batch": micro, **parts})
    rows: list[dict[str, Any]] = []
    group = None
    for row in measured(options, None if options.limit is None else began + options.limit):
        rows.append(row)
        if row.get("group") not in (group, None):
            group = row["group"]
            print(f"\n{group}")
        print(line_of(row), flush=True)
        write(options, machine, torch.__version__, rows, estimates)
    print(f"\nbytes of a step of {LARGE_BATCH:,} volumes with cached gradients, calculated, GB")
    for each in estimates:
        shown = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in each.items() if isinstance(value, float))
        print(f"{each['encoder']}, {' x '.join(map(str, each['shape']))}, {each['micro_batch']} at once: {shown}")
    if options.gpu:
        print("\n" + "\n".join(targets(rows)))
    else:
        print("\nNot run without a GPU: bf16 of convolutions, compiled rows, the 1,024-volume step, the GPU's targets.")
    print(f"{time.monotonic() - began:.0f} s in all")


def write(
    options: argparse.Namespace, machine: str, version: str, rows: list[dict[str, Any]], estimates: list[dict[str, Any]]
) -> None:
    """The rows that there are, complete or not at all."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_name(f"{options.out.name}.partial")
    table = {"machine": machine, "torch": version, "gpu": options.gpu, "rows": rows, "estimates": estimates,
             "targets": targets(rows) if options.gpu else None}  # fmt: skip
    partial.write_text(json.dumps(table, indent=1) + "\n")
    partial.replace(options.out)


if __name__ == "__main__":
    main()
