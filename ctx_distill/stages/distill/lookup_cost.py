"""What a training step's lookups cost: embedding, search and fetch, in milliseconds and as a share of the step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class LookupClock:
    """Adds up a step's lookups.

    On a GPU two events of its stream are the clock: a search waits until the stream has come to its queries, and a
    clock on the host would count the step before as part of the lookup.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._began = time.perf_counter()

    def restart(self) -> None:
        """A step begins now; what was measured since the last one (a validation's lookups) does not count."""
        self._seconds, self._events = 0.0, []
        self._began = time.perf_counter()

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Count what runs inside."""
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
        """Milliseconds of lookups in the step that ends now, and their share of its time, waiting for data included."""
        for first, last in self._events:
            last.synchronize()  # behind it lies a copy from the host alone: the search has waited for the rest
            self._seconds += first.elapsed_time(last) / 1e3
        spent, whole = self._seconds, time.perf_counter() - self._began
        self.restart()
        return 1e3 * spent, spent / whole
