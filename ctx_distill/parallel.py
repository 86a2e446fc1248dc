"""Apply a function to many items in worker processes, with bounded memory, a progress bar and prompt interruption.

The pool is that of `concurrent.futures`. pebble would report the item of a dead worker by itself, but it would replace only
`_one_by_one`: the bound on items in flight and the stop at a signal would remain here, with one more dependency.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from ctx_distill import signals
from ctx_distill.errors import InputError
from ctx_distill.progress import LogLine, progress_bar

T = TypeVar("T")
R = TypeVar("R")

DIED = "was killed (out of memory, or a crashed decoder)"


def usable_cores() -> int:
    """Return the number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    title: str,
    function: Callable[[T], R],
    items: Iterable[T],
    total: int,
    workers: int | None = None,
    died: Callable[[T], R] | None = None,
) -> Iterator[tuple[T, R]]:
    """Yield each item with its result, in the order of completion.

    Args:
        title: title of the progress bar.
        function: module-level function, run in spawned processes with one torch thread each.
        items: items to process; at most four per worker are in flight.
        total: number of items.
        workers: number of processes; None uses one per core.
        died: returns the result for an item that killed its process (out of memory, a crashed decoder). The items in
            flight are then repeated one by one to identify it.

    Raises:
        InputError: an item killed its process, and `died` is None.
        StopRequested: stopped by a signal; items yielded before are complete.
    """
    waiting, workers = iter(items), max(1, min(workers or usable_cores(), total))
    pool = _pool(workers)
    try:
        with progress_bar() as progress:
            bar = progress.add_task(title, total=total)
            running: dict[Future[R], T] = {}
            log = LogLine(title, total)
            while True:
                if signals.requested():
                    raise signals.StopRequested(title)
                suspects: list[T] = []
                for item in islice(waiting, 4 * workers - len(running)):
                    try:
                        running[pool.submit(function, item)] = item
                    except BrokenProcessPool:
                        suspects.append(item)
                if not running and not suspects:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    item = running.pop(future)
                    if isinstance(future.exception(), BrokenProcessPool):
                        suspects.append(item)
                        continue
                    yield item, future.result()
                    progress.advance(bar)
                    log.advance()
                if suspects and not signals.requested():  # otherwise the signal reached the workers too
                    suspects += running.values()
                    running.clear()
                    pool.shutdown()
                    for item, value in _one_by_one(title, function, suspects, died):
                        yield item, value
                        progress.advance(bar)
                        log.advance()
                    pool = _pool(workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _one_by_one(
    title: str, function: Callable[[T], R], items: Iterable[T], died: Callable[[T], R] | None
) -> Iterator[tuple[T, R]]:
    """Process one item at a time, to identify the one that kills its process."""
    pool = _pool(1)
    try:
        for item in items:
            try:
                value = pool.submit(function, item).result()
            except BrokenProcessPool as error:
                if signals.requested():
                    raise signals.StopRequested(title) from None
                if died is None:
                    message = f"{title}: the process for {item} {DIED}; exclude the item, or provide more memory"
                    raise InputError(message) from error
                pool.shutdown()
                value, pool = died(item), _pool(1)
            yield item, value
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    """Set up a worker: one torch thread, and exit with the parent process."""
    end_with_parent()
    os.environ["OMP_NUM_THREADS"] = "1"  # in case torch is imported later; text processing does not need it
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def end_with_parent() -> None:
    """End this worker when its parent is gone. A killed parent cannot stop its workers, which would wait forever."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
