"""What each part of `make gpu-report` is given, and what it gives back.

A part is a module with `TITLE`, one line, and

    def run(context: Context) -> Iterator[Row]

that yields a row whenever it has one. The row is on disk before the next one starts, so a part that is stopped loses only
the row it was at. Rows come most valuable first, and none starts when `context.left()` is too short for it. A module may
also have `targets(rows) -> list[Target]`: what was to be reached, evaluated on the rows there are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]
"""JSON values. `name` says what was run; a row with `error` failed, and the text says why; one with `skipped` was not run.
All other keys are results, with the unit in the key's name where it is not obvious (`step_s`, `memory_gb`)."""


@dataclass(frozen=True)
class Target:
    """What a figure was to reach.

    Attributes:
        what: the figure and its bound, in words.
        value: as measured.
        reached: whether it is within the bound.
    """

    what: str
    value: float
    reached: bool


@dataclass(frozen=True)
class Context:
    """How a part is run.

    Attributes:
        device: `cuda` or `cpu`. With `cpu`, no GPU is visible to the part.
        scale: `full`, or `small` for the rehearsal on a CPU: the same code on sizes that take a minute or two.
        work: scratch folder that the parts share; it is kept between runs, so what is already there need not be made again.
        deadline: the part is stopped at this moment of `time.time()`.
        faiss_gpu: whether the FAISS on the path is the one for GPUs.
        repo: root of the working tree.
        finished: names of rows that an earlier run of this part has measured; they need not be measured again.
        only: texts, one of which the name of a row must contain; empty: all rows.
    """

    device: str
    scale: str
    work: Path
    deadline: float
    faiss_gpu: bool
    repo: Path
    finished: frozenset[str] = frozenset()
    only: tuple[str, ...] = ()

    @property
    def full(self) -> bool:
        """Whether the sizes are those of the real run."""
        return self.scale == "full"

    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.deadline - time.time()

    def wanted(self, name: str) -> bool:
        """Whether a row is to be measured."""
        return name not in self.finished and (not self.only or any(text in name for text in self.only))


class Part(Protocol):
    """A module that is a part."""

    TITLE: str

    def run(self, context: Context) -> Iterator[Row]:
        """Yield the rows."""
        ...
