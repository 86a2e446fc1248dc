"""One function over many items in worker processes: bounded, with a progress bar, stopped at once by an error or Ctrl-C.

The processes are those of `concurrent.futures`. pebble would report the item of a dead worker by itself, but that replaces
only `_one_by_one`: the bound on items in flight and the stop at a signal would stay ours, with one more dependency.
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

DIED = "was ended by the system (no memory left, or a decoder that crashed)"


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    title: str,
    function: Callable[[T], R],
    items: Iterable[T],
    total: int,
    workers: int | None = None,
    died: Callable[[T], R] | None = None,
) -> Iterator[tuple[T, R]]:
    """Each item with the function's value, in the order they are done.

    Args:
        title: beside the progress bar.
        function: a function of a module; it is run in processes started afresh, with one thread of torch each.
        items: may be endless as far as memory goes: four a worker are in flight.
        total: their number.
        workers: processes; None takes one a core.
        died: the value of an item that ended its process (no memory, a crash of a decoder); what was in flight beside it is
            run again, each alone, to find out which it was.

    Raises:
        InputError: an item ended its process, and there is no `died`.
        StopRequested: a signal asked for it; what is yielded by then is done.
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
                if suspects and not signals.requested():  # else the signal reached the workers too
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
    """As `in_processes` with one item in flight, so that it is known which one ends the process."""
    pool = _pool(1)
    try:
        for item in items:
            try:
                value = pool.submit(function, item).result()
            except BrokenProcessPool as error:
                if signals.requested():
                    raise signals.StopRequested(title) from None
                if died is None:
                    told = f"{title}: the process that worked on {item} {DIED}; leave it out, or give more memory"
                    raise InputError(told) from error
                pool.shutdown()
                value, pool = died(item), _pool(1)
            yield item, value
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    """Set up a worker: torch gets one thread there, and it ends with the process that started it."""
    end_with_parent()
    os.environ["OMP_NUM_THREADS"] = "1"  # of a torch that is imported later: reading texts needs none
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def end_with_parent() -> None:
    """End this worker when its parent is gone: a killed parent cannot end its workers, which would wait forever."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
