"""Stages 2 and 3 on 1, 2 and 4 gloo processes of this machine: `make bench-processes`.

The demo's encoder and volumes, one thread a process, the same volumes a process (weak scaling). Where there are fewer
cores than processes, the processes share them: the figures then show what gathering costs, not what more machines give.
`gathering` is the share of the step in the collectives that the host waits for (the features', `ctx_distill.distributed`,
and words between ranks), waiting for a slower rank included; DDP's sum of gradients runs beside backward and is not in it.
`CPU s`: of a step, the process that took most; other work on the machine does not show in it, waiting does not either.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from train_data import make_data, volume_spec

OUT = Path(__file__).parents[1] / "runs" / "bench"
SHAPE = (40, 56, 56)


def measure(
    stage: str, data: str, manifest: str, batch: int, warmup: int, steps: int, encoder: str, shape: list[int]
) -> dict[str, float]:
    """One rank's step and its share of gathering; the ranks are given by RANK, WORLD_SIZE and MASTER_PORT."""
    import lightning as L
    import torch
    import torch.distributed as dist
    from train_flops import encoder_of

    from ctx_distill.data.loading.datamodules import CTDataModule
    from ctx_distill.models.ct_encoder import ResNet3D
    from ctx_distill.stages.align.report_tower import TextSettings
    from ctx_distill.stages.align.task import AlignmentTask
    from ctx_distill.stages.distill.task import DistillationTask

    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    size = (shape[0], shape[1], shape[2])
    model = ResNet3D("small") if encoder == "demo" else encoder_of(encoder, size, 8)
    common: dict[str, Any] = {"expert": f"{data}/expert", "index": f"{data}/index"}
    task: Any
    if stage == "distill":
        task = DistillationTask(model, anchors="prompts", vocabulary="phantom", **common)
    else:
        task = AlignmentTask(encoder=model, text=TextSettings(tower="expert", trainable=False), **common)
    task.finish = lambda *_: {}
    seconds: list[float] = []
    works: list[float] = []
    gathered = [0.0]

    def timed(call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = call(*args, **kwargs)
            gathered[0] += time.perf_counter() - began
            return result

        return run

    class Clock(L.Callback):
        last = work = 0.0

        def on_train_start(self, *_: Any) -> None:
            dist.all_gather, dist.all_reduce = timed(dist.all_gather), timed(dist.all_reduce)

        def on_train_epoch_start(self, *_: Any) -> None:
            self.last, self.work = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, *_: Any) -> None:
            end, work = time.perf_counter(), time.process_time()
            seconds.append(end - self.last)
            works.append(work - self.work)
            self.last, self.work = end, work
            if len(seconds) == warmup:
                gathered[0] = 0.0

    world = int(os.environ["WORLD_SIZE"])
    module = CTDataModule(
        manifest, volume_spec(size), batch_size=batch, cache_gb=0.0, text="required",
        prepared=f"{data}/prepared/{'x'.join(map(str, size))}",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_steps=warmup + steps,
            max_epochs=-1, logger=False, default_root_dir=folder, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        )  # fmt: skip
        trainer.callbacks.append(Clock())
        task.run(trainer, module, Path(folder))
    counted = seconds[warmup:]
    return {"step_s": median(counted), "cpu_s": median(works[warmup:]), "gather_share": gathered[0] / sum(counted)}


def run_ranks(world: int, arguments: dict[str, Any], port: int) -> dict[str, float]:
    """The slowest rank's step, the least share of gathering (the others' holds their waiting for it), volumes a second."""
    processes = []
    for rank in range(world):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
                       "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_RUN_ID": "bench"}  # fmt: skip
        command = [sys.executable, __file__, "--measure", json.dumps(arguments)]
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
    printed = [process.communicate() for process in processes]
    for process, (_, said) in zip(processes, printed, strict=True):
        if process.returncode:
            raise SystemExit(f"{world} processes: {said[-2000:]}")
    ranks = [json.loads(out.splitlines()[-1]) for out, _ in printed]
    step = max(rank["step_s"] for rank in ranks)
    return {"step_s": step, "cpu_s": max(rank["cpu_s"] for rank in ranks), "gather_share": min(rank["gather_share"] for rank in ranks),
            "gather_share_largest": max(rank["gather_share"] for rank in ranks),
            "volumes_s": world * arguments["batch"] / step}  # fmt: skip


def free_port() -> int:
    """A port that nobody listens on now."""
    import socket

    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def main() -> None:
    """Print the table and write it, or, as a child, measure one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--stages", nargs="+", choices=("distill", "align"), default=["distill", "align"])
    parser.add_argument("--encoder", default="demo")
    parser.add_argument("--shape", nargs=3, type=int, default=list(SHAPE))
    parser.add_argument("--batch", type=int, default=8, help="volumes a process")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--index-rows", type=int, default=20_000)
    parser.add_argument("--embed-dim", type=int, default=128)
    parser.add_argument("--data", type=Path, default=OUT / "processes-data")
    parser.add_argument("--out", type=Path, default=OUT / "processes.json")
    parser.add_argument("--measure", metavar="JSON", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(**json.loads(options.measure))))
        return
    options.data.mkdir(parents=True, exist_ok=True)
    shape = (options.shape[0], options.shape[1], options.shape[2])
    volumes = options.batch * (options.warmup + options.steps) * max(options.worlds)
    manifests = make_data(options.data, {shape: volumes}, options.index_rows, options.embed_dim, os.cpu_count())
    print(f"{os.cpu_count()} CPU cores, gloo, one thread a process; {options.batch} volumes of {' x '.join(map(str, shape))} a process;"
          f" median of {options.steps} steps after {options.warmup}")  # fmt: skip
    print(
        f"{'stage':<8}{'processes':>10}{'volumes/s':>11}{'step s':>9}{'CPU s':>8}{'gathering, least':>18}{'largest':>9}",
        flush=True,
    )
    table = []
    for stage in options.stages:
        for world in options.worlds:
            arguments = {"stage": stage, "data": str(options.data), "manifest": str(manifests[shape]),
                         "batch": options.batch, "warmup": options.warmup, "steps": options.steps,
                         "encoder": options.encoder, "shape": list(shape)}  # fmt: skip
            row = {"stage": stage, "processes": world, **run_ranks(world, arguments, free_port())}
            table.append(row)
            print(f"{stage:<8}{world:>10}{row['volumes_s']:>11.2f}{row['step_s']:>9.3f}{row['cpu_s']:>8.3f}{row['gather_share']:>18.4f}"
                  f"{row['gather_share_largest']:>9.4f}", flush=True)  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_name(f"{options.out.name}.partial")
    partial.write_text(json.dumps({"cores": os.cpu_count(), "rows": table}, indent=1) + "\n")
    partial.replace(options.out)


if __name__ == "__main__":
    main()
