"""Runs the ablation's jobs in worker processes, writes each one's rows as it ends, and picks up where it was stopped."""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

from ctx_distill.ablation.analysis import crossed
from ctx_distill.ablation.cohort_manifests import Cohort, open_cohort
from ctx_distill.ablation.execute import JobScore, Place, ensure_expert, run_job
from ctx_distill.ablation.options import AblationOptions
from ctx_distill.ablation.plan import AblationJob, Plan, config_hash, read_plan, selection_jobs, table_jobs
from ctx_distill.ablation.records import ROWS, Records
from ctx_distill.ablation.tables import write_report
from ctx_distill.errors import InputError
from ctx_distill.files import hash_file, hash_json
from ctx_distill.progress import progress_bar
from ctx_distill.runs.runner import find_manifest

# Raised so that glibc keeps freed volumes: giving each back to the kernel costs a quarter of the time.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}


def run_ablation(options: AblationOptions) -> Path:
    """Choose learning rates on `val`, run the table, write its report; returns the page.

    Raises:
        InputError: an unknown arm or regime, or a cohort that does not fit the plan.
    """
    plan = read_plan(options.plan)
    arms = _known("ARMS", options.arms, plan.arms)
    regimes = _known("REGIMES", options.regimes, plan.regimes)
    records = Records.open(options.record_folder)
    if not options.report:
        _run_all(options, plan, records, arms, regimes)
    return write_report(plan, records, options.run, options.record_folder.with_name(f"{options.record_folder.name}.md"))


def _known(what: str, asked: Sequence[str], known: Iterable[str]) -> list[str]:
    names = list(known)
    asked = [name for words in asked for name in words.split()]  # make passes all names as one word
    if unknown := sorted(set(asked) - set(names)):
        raise InputError(f"{what}: {unknown[0]!r} is not known; expected some of {', '.join(names)}.")
    return list(asked or names)


def _run_all(options: AblationOptions, plan: Plan, records: Records, arms: list[str], regimes: list[str]) -> None:
    open_cohort(options.data, plan)
    os.environ.update({name: os.environ.get(name, value) for name, value in _MALLOC.items()})
    cores = len(os.sched_getaffinity(0))
    workers = options.workers or cores
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // workers))
    place = Place(options.run, options.preset)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for future in [
                pool.submit(_expert, place, options.data, options.plan, plan.regimes[name].expert) for name in regimes
            ]:
                future.result()
            _run(pool, place, options, plan, records, selection_jobs(plan, arms), "learning rates, on val")
            jobs = table_jobs(plan, arms, regimes, options.seeds, records.rates())
            _run(pool, place, options, plan, records, jobs, "the table, on test")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(
    pool: ProcessPoolExecutor,
    place: Place,
    options: AblationOptions,
    plan: Plan,
    records: Records,
    jobs: Iterable[AblationJob],
    title: str,
) -> None:
    data = hash_json([hash_file(find_manifest(options.data, kind)) for kind in ("ct", "xray")])
    hashes = {job: config_hash(plan, job, options.preset, data) for job in jobs}
    waiting = [job for job in hashes if (options.again and not job.select) or not records.has(job, hashes[job])]
    print(f"{title}: {len(hashes)} runs, {len(hashes) - len(waiting)} of them done before")
    futures: dict[Future[tuple[JobScore, float]], AblationJob] = {
        pool.submit(_work, place, options.data, options.plan, job): job for job in waiting
    }
    with progress_bar() as progress:
        bar = progress.add_task(title, total=len(waiting))
        for future in as_completed(futures):
            job = futures[future]
            score, seconds = future.result()
            value = score.metrics["macro_auroc"]
            told = f"{job.folder} lr {job.learning_rate:g}: macro AUROC {value:.3f} ({seconds:.0f} s)"
            if records.has(job, hashes[job]):
                arm = job.regime.name, job.arm.name
                values = records.values(*arm)
                interval = crossed(values, records.resampled(*arm))
                told += f"; before {values[job.seed]:.3f}, the arm's interval [{interval.low:.3f}, {interval.high:.3f}]"
                told += "" if interval.low <= value <= interval.high else ", OUTSIDE"
            else:
                records.add(job, hashes[job], score)
                if options.record_folder != options.run and not job.select:
                    shutil.copyfile(options.record_folder / ROWS, options.run / ROWS)
            progress.advance(bar)
            print(told, flush=True)


@functools.cache
def _opened(data: Path, plan_file: Path | None) -> tuple[Plan, Cohort]:
    plan = read_plan(plan_file)
    return plan, open_cohort(data, plan)


def _expert(place: Place, data: Path, plan_file: Path | None, name: str) -> Path:
    return ensure_expert(place, *_opened(data, plan_file), name)


def _work(place: Place, data: Path, plan_file: Path | None, job: AblationJob) -> tuple[JobScore, float]:
    import contextlib

    started = time.monotonic()
    folder = place.run / job.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("w") as log, contextlib.redirect_stdout(log):
        score = run_job(place, *_opened(data, plan_file), job)
    return score, time.monotonic() - started
