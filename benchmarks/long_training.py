"""What the method's parts do in long training: the arms of `stages/ablation_long.yaml`, each scored on `val` of phantoms.

The phantoms are made first, by all cores. Then the X-ray expert and its index are built, and the arms are trained, several
at a time, each in a process of its own; on a GPU all processes share it and train in bf16. Every arm is a job of the ablation
(`ctx_distill.ablation`) that chooses a learning rate: it is scored on `val`, and no study of `test` is read. One seed, one
expert, one cohort: intervals are of the scored patients alone, and nothing that is reported here is a result of the method.

An arm's row is written as soon as it is scored. After `--limit` seconds the arms that still run are stopped and named in
`not_finished`. With `--run` an earlier run's phantoms, expert, index and rows are used again. `--device cpu --scale small`
rehearses everything in a few steps.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ctx_distill.ablation.plan import CORE, AblationJob, Expert, Plan, read_plan
from ctx_distill.files import write_json, write_text
from ctx_distill.runs.stage_table import load_preset, merge, stages_folder

OUT = Path(__file__).parents[1] / "runs" / "bench"
PLAN = "ablation_long.yaml"
SMALL = {"seed": 21, "generator": 1, "ct": 44, "xray": 40, "candidates": 24, "val": 6, "labelled": 6}
EXPERT = "base"


def plan_of(scale: str) -> Plan:
    """The shipped plan, or one of the same arms that is over in seconds."""
    plan = read_plan(stages_folder() / PLAN)
    if scale == "full":
        return plan
    core = replace(plan.regimes[CORE], pairs=20, pool=40)
    expert = Expert(EXPERT, xrays=40, epochs=1, corpus=40)
    return replace(plan, cohort=SMALL, steps=8, regimes={CORE: core}, experts={EXPERT: expert})


def write_preset(folder: Path, device: str) -> Path:
    """The preset `ablation`, on the device; in bf16 on either, so that a rehearsal computes what the GPU will."""
    trainer = {"accelerator": "gpu" if device == "cuda" else "cpu", "devices": 1, "precision": "bf16-mixed"}
    sections = merge(load_preset("ablation"), {"all": {"trainer": trainer}})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "preset.yaml"
    write_text(path, json.dumps(sections, indent=1) + "\n")  # JSON is YAML
    return path


@functools.cache
def _opened(data: Path, scale: str) -> tuple[Plan, Any]:
    from ctx_distill.ablation.cohort_manifests import open_cohort

    plan = plan_of(scale)
    return plan, open_cohort(data, plan)


def _begin(threads: int) -> None:
    """Set a worker up; it ends with its parent, so that none is left on the GPU when a time limit kills that."""
    import torch

    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(threads)


def make_expert(run: Path, preset: Path, data: Path, scale: str) -> float:
    """Train the expert where it is not there yet; returns seconds."""
    from ctx_distill.ablation.execute import Place, ensure_expert

    began = time.monotonic()
    ensure_expert(Place(run, str(preset)), *_opened(data, scale), EXPERT)
    return time.monotonic() - began


def train_arm(run: Path, preset: Path, data: Path, scale: str, arm: str) -> dict[str, Any]:
    """Train one arm and score it on `val`: a row of the result."""
    import contextlib

    from ctx_distill.ablation.execute import Place, run_job

    plan, cohort = _opened(data, scale)
    job = AblationJob(plan.regimes[CORE], plan.arms[arm], plan.selection_seed, plan.learning_rates[0], select=True)
    folder = run / job.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (folder.parent / f"{folder.name}.log").open("w") as log, contextlib.redirect_stdout(log):
        score = run_job(Place(run, str(preset)), plan, cohort, job)
    low, high = np.nanquantile(score.replicates, [0.025, 0.975])
    interval = {"low": float(low), "high": float(high)}
    return {
        "arm": arm, "title": plan.arms[arm].title, "scored_on": "val", "scored": len(cohort.val), "steps": plan.steps,
        "pairs": job.regime.pairs, "seconds": time.monotonic() - began, "interval": interval, **score.metrics,
    }  # fmt: skip


def main() -> int:
    """Make phantoms, expert and index, then run the arms; 0 where all finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", choices=("full", "small"), default="full")
    parser.add_argument("--arms", nargs="+", default=None, help="default: all of the plan, in its order")
    parser.add_argument(
        "--workers", type=int, default=None, help="arms at a time (default: one per 2 cores, at most 8)"
    )
    parser.add_argument("--limit", type=float, default=np.inf, metavar="SECONDS", help="stop after so long")
    parser.add_argument("--run", type=Path, default=OUT / "long-training", help="phantoms, expert, index and arms")
    parser.add_argument("--out", type=Path, default=OUT / "long_training.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # workers are ended on the way out
    began = time.monotonic()
    plan = plan_of(options.scale)
    arms = options.arms or list(plan.regimes[CORE].arms)
    if unknown := sorted(set(arms) - set(plan.arms)):
        parser.error(f"--arms: {unknown[0]!r} is no arm of {PLAN}; choose from {', '.join(plan.regimes[CORE].arms)}")
    cores = len(os.sched_getaffinity(0))
    workers = options.workers or max(1, min(8, cores // 2, len(arms)))
    result: dict[str, Any] = {
        "device": options.device, "scale": options.scale, "workers": workers, "cores": cores, "complete": False,
        "cohort": plan.cohort, "seconds": {}, "rows": _rows_before(options, arms), "not_finished": [],
    }  # fmt: skip

    def note(name: str, since: float) -> None:
        result["seconds"][name] = time.monotonic() - since
        write_json(options.out, result)
        print(f"{name}: {result['seconds'][name]:.1f} s", flush=True)

    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            write_json(options.out, {**result, "error": "no CUDA device"})
            print("not run: torch.cuda.is_available() is False; --device cpu rehearses")
            return 1
        result["device_name"] = torch.cuda.get_device_name()
    from ctx_distill.phantom.cohort import write_cohort

    data, preset = options.run / f"data-{options.scale}", write_preset(options.run, options.device)
    write_cohort(data, plan.cohort["ct"], plan.cohort["xray"], plan.cohort["seed"], cores)
    note("phantoms", began)
    place = (options.run / options.scale, preset, data, options.scale)
    threads = max(1, cores // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(threads,)
    )
    try:
        since, left = time.monotonic(), began + options.limit - time.monotonic()
        expert = pool.submit(make_expert, *place)
        if wait([expert], timeout=None if left == np.inf else max(0.0, left)).done:
            expert.result()
            note("expert", since)
            waiting = [arm for arm in arms if arm not in {row["arm"] for row in result["rows"]}]
            _run_arms(
                {pool.submit(train_arm, *place, arm): arm for arm in waiting}, began + options.limit, result, options
            )
    finally:
        _stop(pool)
    result["not_finished"] = [
        arm for arm in arms if arm not in {row["arm"] for row in result["rows"] if "error" not in row}
    ]
    result["complete"] = not result["not_finished"]
    note("all", began)
    return 0 if result["complete"] else 1


def _run_arms(
    futures: dict[Future[dict[str, Any]], str], end: float, result: dict[str, Any], options: argparse.Namespace
) -> None:
    """Take each arm's row as it ends, until the time is over."""
    pending = set(futures)
    while pending and time.monotonic() < end:
        done, pending = wait(pending, None if end == np.inf else end - time.monotonic(), FIRST_COMPLETED)
        for future in done:
            error = future.exception()
            row = {"arm": futures[future], "error": f"{type(error).__name__}: {error}"} if error else future.result()
            result["rows"].append(row)
            write_json(options.out, result)
            if error:
                told = row["error"]
            else:
                told = f"macro AUROC {row['macro_auroc']:.3f} on {row['scored']} `val` studies, {row['seconds']:.0f} s"
            print(f"{row['arm']}: {told}", flush=True)


def _rows_before(options: argparse.Namespace, arms: list[str]) -> list[dict[str, Any]]:
    """Rows without an error that an earlier call for the same device and scale has written to the same file."""
    before = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if (before.get("device"), before.get("scale")) != (options.device, options.scale):
        return []
    return [row for row in before.get("rows", []) if "error" not in row and row["arm"] in arms]


def _stop(pool: ProcessPoolExecutor) -> None:
    """End the workers, also those in the middle of an arm."""
    running = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in running:
        process.terminate()
    for process in running:
        process.join(10)
        if process.is_alive():
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
