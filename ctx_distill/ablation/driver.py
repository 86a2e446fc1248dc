"""Runs the ablation's jobs in worker processes, writes each one's rows as it ends, and picks up where it was stopped."""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ctx_distill.ablation.cohort import Cohort, open_cohort
from ctx_distill.ablation.execute import Place, Score, ensure_expert, run_job
from ctx_distill.ablation.plan import Job, Plan, config_hash, read_plan, selection_jobs, test_jobs
from ctx_distill.ablation.records import ROWS, Records
from ctx_distill.errors import InputError
from ctx_distill.pipeline.plan import load_preset

# Raised so that glibc keeps freed volumes: giving each back to the kernel costs a quarter of the time.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}


@dataclass(frozen=True)
class Options:
    """What is asked of the ablation.

    Attributes:
        data: the cohort's folder.
        run: where runs go.
        preset: sizes.
        record: folder of the rows: read, and written as runs end.
        arms: those to run; empty runs all.
        seeds: at most so many a regime.
        workers: processes; each gets its share of the cores.
        again: run these arms' jobs anew although their rows stand (a check of the table).
    """

    data: Path
    run: Path
    preset: str = "ablation"
    record: Path = Path("docs/ablation")
    arms: tuple[str, ...] = ()
    seeds: int | None = None
    workers: int = 0
    again: bool = False


def run_ablation(options: Options) -> Records:
    """Choose learning rates on `val`, then run the table.

    Raises:
        InputError: an unknown arm, or a cohort that does not fit the plan.
    """
    plan = read_plan()
    arms = list(options.arms or plan.arms)
    if unknown := sorted(set(arms) - set(plan.arms)):
        raise InputError(f"ARMS: {unknown[0]!r} is not known; expected some of {', '.join(plan.arms)}.")
    open_cohort(options.data, plan)
    records = Records.open(options.record)
    os.environ.update({name: os.environ.get(name, value) for name, value in _MALLOC.items()})
    workers = options.workers or max(1, len(os.sched_getaffinity(0)))
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // workers))
    place = Place(options.run, options.preset)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            needed = {plan.regimes[name].expert for name in plan.regimes if set(plan.regimes[name].arms) & set(arms)}
            for future in [pool.submit(_expert, place, options.data, name) for name in sorted(needed)]:
                print(f"X-ray expert: {future.result()}")
            _run(pool, place, options, plan, records, selection_jobs(plan, arms), "learning rates, on val")
            jobs = test_jobs(plan, arms, options.seeds, records.rates())
            _run(pool, place, options, plan, records, jobs, "the table, on test")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print(f"rows: {options.record / ROWS}")
    return records


def _run(
    pool: ProcessPoolExecutor,
    place: Place,
    options: Options,
    plan: Plan,
    records: Records,
    jobs: Iterable[Job],
    title: str,
) -> None:
    preset = load_preset(options.preset)
    hashes = {job: config_hash(plan, job, preset) for job in jobs}
    waiting = [job for job in hashes if (options.again and not job.select) or not records.has(job, hashes[job])]
    print(f"{title}: {len(hashes)} runs, {len(hashes) - len(waiting)} of them done before")
    futures: dict[Future[tuple[Score, float]], Job] = {
        pool.submit(_work, place, options.data, job): job for job in waiting
    }
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task(title, total=len(waiting))
        for future in as_completed(futures):
            job = futures[future]
            score, seconds = future.result()
            records.add(job, hashes[job], score)
            progress.advance(bar)
            value = score.metrics["macro_auroc"]
            print(f"{job.folder} lr {job.learning_rate:g}: macro AUROC {value:.3f} ({seconds:.0f} s)", flush=True)


@functools.cache
def _opened(data: Path) -> tuple[Plan, Cohort]:
    plan = read_plan()
    return plan, open_cohort(data, plan)


def _expert(place: Place, data: Path, name: str) -> Path:
    return ensure_expert(place, *_opened(data), name)


def _work(place: Place, data: Path, job: Job) -> tuple[Score, float]:
    import contextlib

    started = time.monotonic()
    folder = place.run / job.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("w") as log, contextlib.redirect_stdout(log):
        score = run_job(place, *_opened(data), job)
    return score, time.monotonic() - started


def parse_arms(text: str | None) -> Sequence[str]:
    """The names of `ARMS="a b"`; none stands for all."""
    return tuple((text or "").replace(",", " ").split())
