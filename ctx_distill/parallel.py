"""One function over many items in worker processes: bounded, with a progress bar, stopped at once by an error or Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
R = TypeVar("R")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    title: str, function: Callable[[T], R], items: Iterable[T], total: int, workers: int | None = None
) -> Iterator[tuple[T, R]]:
    """Each item with the function's value, in the order they are done.

    Args:
        title: beside the progress bar.
        function: a function of a module; it is run in processes started afresh, with one thread of torch each.
        items: may be endless as far as memory goes: four a worker are in flight.
        total: their number.
        workers: processes; None takes one a core.
    """
    waiting, workers = iter(items), max(1, min(workers or usable_cores(), total))
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with (
        Progress(*columns) as progress,
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread) as pool,
    ):
        bar = progress.add_task(title, total=total)
        try:
            running: dict[Future[R], T] = {}
            while True:
                for item in islice(waiting, 4 * workers - len(running)):
                    running[pool.submit(function, item)] = item
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
                    progress.advance(bar)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
