"""Speed of stages 2 and 3 beside plain loops: `make bench-train` (ARGS="--help" for sizes).

Every row is a process of its own. `stage 2` and `stage 3` are the project's tasks under their trainer, fed from the
prepared volumes, stage 2 looking up live in a synthetic index; `plain` is the same model and open_clip's ClipLoss in a
short loop, its volumes already on the device. `utilisation` is the encoder's operations (forward and backward, each
multiplication and addition, nothing that is computed twice) over the best of large matrix products in the same process.
`wait`: from the end of a batch to the start of the next, reading and copying to the device. Without a GPU the default is
a small set of rows, one thread and one step each, in seconds of CPU time: they say that everything runs, not how fast a
GPU is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from train_flops import encoder_of, kept_bytes
from train_steps import Job, device_here, measure

OUT = Path(__file__).parents[1] / "runs" / "bench"
SHAPES = [(112, 256, 352), (96, 192, 192)]
LARGE_BATCH = 1024
ROOM = 60e9
"""Bytes of device memory that a global batch of 1,024 volumes may take (issue 5)."""


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """The rows, those that are compared next to each other."""
    rows: list[Job] = []
    bf16 = "bf16-mixed"
    trained = bf16 if options.gpu else "32-true"
    common: dict[str, Any] = {"patch": options.patch, "batch": options.batch, "warmup": options.warmup,
                              "steps": options.steps, "workers": options.workers, "data": str(options.data)}  # fmt: skip
    for shape in options.shapes:
        for encoder in options.encoders:
            given = {**common, "encoder": encoder, "shape": shape, "checkpointing": options.checkpointing}
            fast = {"compile": options.compile, "precision": trained}
            rows += [Job(kind=kind, **given, **fast) for kind in ("distill", "align")]
            rows.append(Job(kind="plain", precision="32-true", **given))
            if options.gpu or encoder.startswith("vit"):
                rows.append(Job(kind="plain", precision=bf16, **given))
            if options.gpu and not encoder.startswith("vit"):
                rows.append(Job(kind="plain", precision=bf16, compile=True, **given))
    if options.gpu:
        shape, encoder = options.shapes[-1], options.encoders[0]
        many = {**common, "batch": LARGE_BATCH, "warmup": 0, "steps": 1}
        rows.append(Job(kind="cached", encoder=encoder, shape=shape, precision=bf16, micro_batch=options.micro_batch,
                        compile=options.compile, **many))  # fmt: skip
    return rows


def name_of(job: Job) -> str:
    """A row's name."""
    what = {"distill": "stage 2", "align": "stage 3", "plain": "plain", "cached": f"stage 3, {job.micro_batch} at once"}
    traits = [job.precision.removesuffix("-mixed").replace("32-true", "fp32")]
    traits += ["compiled"] * job.compile + ["checkpointed"] * job.checkpointing
    return f"{what[job.kind]}, {', '.join(traits)}"


def in_its_own_process(job: Job, threads: int) -> dict[str, Any]:
    """The row, or what went wrong."""
    command = [sys.executable, __file__, "--measure", json.dumps(job.to_json())]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"error": (done.stderr.strip() or "no word").splitlines()[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


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
    """What issue 5 asks of a GPU, each reached or not."""

    def find(like: dict[str, Any], **other: Any) -> dict[str, Any] | None:
        same = {"encoder": like["encoder"], "shape": like["shape"], "kind": "plain", **other}
        return next(
            (r for r in rows if "error" not in r and all(r[name] == value for name, value in same.items())), None
        )

    said = []
    for row in (each for each in rows if "error" not in each):
        place = f"{row['encoder']}, {' x '.join(map(str, row['shape']))}, {row['name']}"
        checks: list[tuple[str, float, bool]] = []
        if row["kind"] in ("distill", "align"):
            lost = row["wait_share"] + row["lookup_share"]
            checks.append(("data and lookup under .02 of the step", lost, lost < 0.02))
            if row["encoder"].startswith("vit"):
                checks.append(("utilisation .45 or more", row["utilisation"], row["utilisation"] >= 0.45))
            if fp32 := find(row, precision="32-true"):
                factor = row["volumes_s"] / fp32["volumes_s"]
                checks.append(("2 or more times the plain fp32 loop", factor, factor >= 2))
            if not row["encoder"].startswith("vit") and (plain := find(row, precision="bf16-mixed", compile=True)):
                share = row["volumes_s"] / plain["volumes_s"]
                checks.append((".95 or more of the compiled plain loop", share, share >= 0.95))
        if row["kind"] == "cached":
            checks.append(("1,024 volumes in under 60 GB", row["memory_gb"], row["memory_gb"] * 1e9 < ROOM))
        said += [
            f"{place}: {what}: {value:.3f}, {'reached' if good else 'NOT reached'}" for what, value, good in checks
        ]
    return said


def shapes_of(text: str) -> tuple[int, int, int]:
    """`96x192x192`."""
    depth, rows, columns = (int(edge) for edge in text.split("x"))
    return depth, rows, columns


def parse() -> argparse.Namespace:
    """The options, with this machine's defaults."""
    gpu = device_here().type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=shapes_of, default=SHAPES if gpu else SHAPES[1:])
    parser.add_argument("--encoders", nargs="+", default=["vit_b", "resnet50"])
    parser.add_argument("--patch", type=int, default=8 if gpu else 16, help="edge of a ViT's token")
    parser.add_argument("--batch", type=int, default=8 if gpu else 1)
    parser.add_argument("--warmup", type=int, default=4 if gpu else 1)
    parser.add_argument("--steps", type=int, default=16 if gpu else 1)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=8 if gpu else 0)
    parser.add_argument("--threads", type=int, default=(os.cpu_count() or 1) if gpu else 1)
    parser.add_argument("--index-rows", type=int, default=300_000 if gpu else 20_000)
    parser.add_argument("--embed-dim", type=int, default=512)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=gpu)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--data", type=Path, default=OUT / "train-data")
    parser.add_argument("--out", type=Path, default=OUT / "train.json")
    parser.add_argument("--measure", metavar="JSON", help=argparse.SUPPRESS)
    return parser.parse_args(namespace=argparse.Namespace(gpu=gpu))


def main() -> None:
    """Print the table and write it, or, as a child, one row of it."""
    options = parse()
    if options.measure:
        print(json.dumps(measure(Job.from_json(json.loads(options.measure)))))
        return
    import torch
    from train_data import make_data

    began = time.monotonic()
    options.data.mkdir(parents=True, exist_ok=True)
    volumes = options.batch * (options.warmup + options.steps)
    make_data(options.data, volumes, options.shapes, options.index_rows, options.embed_dim, os.cpu_count())
    machine = torch.cuda.get_device_name() if options.gpu else f"CPU seconds, {options.threads} thread, no GPU"
    print(f"{machine}, torch {torch.__version__}, seed 0; batch {options.batch}, tokens of {options.patch}^3 voxels, index of "
          f"{options.index_rows:,} x {options.embed_dim}; median of {options.steps} steps after {options.warmup}")  # fmt: skip
    print(
        f"{'':<34}{'volumes/s':>10}{'step s':>9}{'wait':>7}{'lookup':>8}{'peak GB':>9}{'TFLOP/s':>9}{'matmul':>8}{'util.':>7}"
    )
    rows: list[dict[str, Any]] = []
    group = None
    for job in jobs_of(options):
        title = f"{job.encoder}, {' x '.join(map(str, job.shape))}"
        if title != group:
            print(f"\n{title}")
            group = title
        row = {**job.to_json(), "name": name_of(job), **in_its_own_process(job, options.threads)}
        del row["data"]
        rows.append(row)
        if "error" in row:
            print(f"{row['name']:<34}{row['error']}", flush=True)
            continue
        print(f"{row['name']:<34}{row['volumes_s']:>10.3f}{row['step_s']:>9.2f}{row['wait_share']:>7.3f}{row['lookup_share']:>8.4f}"
              f"{row['memory_gb']:>9.2f}{row['volumes_s'] * row['flops'] / 1e12:>9.3f}{row['matmul_flops_s'] / 1e12:>8.3f}"
              f"{row['utilisation']:>7.3f}", flush=True)  # fmt: skip
    print(f"\nbytes of a step of {LARGE_BATCH:,} volumes with cached gradients, calculated, GB")
    estimates = []
    for shape in options.shapes:
        for encoder in options.encoders:
            parts = estimate(encoder, shape, options.patch, options.micro_batch)
            estimates.append({"encoder": encoder, "shape": shape, "micro_batch": options.micro_batch, **parts})
            shown = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items())
            print(f"{encoder}, {' x '.join(map(str, shape))}, {options.micro_batch} at once: {shown}")
    if options.gpu:
        print("\n" + "\n".join(targets(rows)))
    else:
        print("\nNot run without a GPU: bf16 of convolutions, compiled rows, the 1,024-volume step, the GPU's targets.")
    print(f"{time.monotonic() - began:.0f} s in all")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_name(f"{options.out.name}.partial")
    said = {"machine": machine, "torch": torch.__version__, "gpu": options.gpu, "rows": rows, "estimates": estimates,
            "targets": targets(rows) if options.gpu else None}  # fmt: skip
    partial.write_text(json.dumps(said, indent=1) + "\n")
    partial.replace(options.out)


if __name__ == "__main__":
    main()
