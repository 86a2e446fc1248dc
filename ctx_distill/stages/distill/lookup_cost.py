"""Measure the cost of a training step's lookups (embedding, search and fetch)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class LookupClock:
    """Accumulate the time of a step's lookups.

    On a GPU the time is taken with CUDA events. A search waits until the stream has computed its queries, so a host
    clock would count the preceding step as part of the lookup.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._began = time.perf_counter()

    def restart(self) -> None:
        """Start a step, and discard what was measured since the last one (for example, lookups of a validation)."""
        self._seconds, self._events = 0.0, []
        self._began = time.perf_counter()

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Add the time of the enclosed block."""
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            yield
            last.record()
            self._events.append((first, last))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def end_step(self) -> tuple[float, float]:
        """Return the lookup time of the step that ends now, in milliseconds, and as a share of the step's time.

        The step's time includes waiting for data.
        """
        for first, last in self._events:
            last.synchronize()  # cheap: the search has already waited for everything but a copy from the host
            self._seconds += first.elapsed_time(last) / 1e3
        lookup_seconds, step_seconds = self._seconds, time.perf_counter() - self._began
        self.restart()
        return 1e3 * lookup_seconds, lookup_seconds / step_seconds
