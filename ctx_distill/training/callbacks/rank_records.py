"""What each rank last said of itself, as small files in a folder that all ranks share, and whom the others wait for."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ctx_distill.files import write_json

EARLIER_S = 60.0
"""A record written so long before this run began is an earlier run's; hosts' clocks agree better than that."""


@dataclass(frozen=True)
class RankRecord:
    """One rank at one moment.

    Attributes:
        rank: which.
        host: its machine.
        pid: its process there.
        step: optimiser steps so far.
        phase: what it does, such as "train batch 17".
        place: training batches begun in this run, and what was noted since the last of them; alike on every rank that
            is equally far, also where ranks validate on unequal numbers of batches.
        at: innermost line of Python of its main thread.
        waiting: whether that is inside torch's collectives or backward.
        idle_s: since it last got on.
        beat: how often it has written.
        written: seconds since 1970 by its own clock.
        ended: why it stopped, "" while it runs.
        hung: whether it stopped as one of a run that hung.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    place: tuple[int, int]
    at: str
    waiting: bool
    idle_s: float
    beat: int
    written: float
    ended: str = ""
    hung: bool = False

    @property
    def name(self) -> str:
        """For a message."""
        return f"rank {self.rank} (host {self.host}, process {self.pid})"

    @property
    def where(self) -> str:
        """For a message."""
        return f"training step {self.step}, {self.phase}, at {self.at}"


def record_file(folder: Path, rank: int) -> Path:
    """Where a rank's record lies."""
    return folder / f"rank-{rank:05d}.json"


def write_record(folder: Path, record: RankRecord) -> None:
    """Replace the rank's record, whole; a disk that does not take it is no reason to end a run."""
    with contextlib.suppress(OSError):
        write_json(record_file(folder, record.rank), asdict(record))


def read_records(folder: Path, ranks: int, since: float) -> dict[int, RankRecord | None]:
    """The record of each rank of the run that began at `since` (seconds since 1970); None where there is none."""
    records: dict[int, RankRecord | None] = dict.fromkeys(range(ranks))
    for rank in records:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            values = json.loads(record_file(folder, rank).read_text())
            record = RankRecord(**{**values, "place": tuple(values["place"])})
            records[rank] = record if record.written >= since - EARLIER_S else None
    return records


def explain(records: Mapping[int, RankRecord | None], silent: set[int]) -> str:
    """One message: which ranks the others wait for, and why they are thought to be the ones.

    First those that give no sign, then those that ended with an error; else the ranks that have got least far and,
    among equals, do not wait in a collective themselves. A rank without a record has not begun or is through: it is
    to blame only where all the others wait.

    Args:
        records: by rank, all ranks of the run.
        silent: those whose record is not written any more.
    """
    known = [record for record in records.values() if record is not None]
    missing = sorted(set(records) - {record.rank for record in known})
    ended = [record for record in known if record.ended and not record.hung]
    if silent:
        guilty = sorted(silent)
        lines = [
            f"{record.name} gives no sign: its process has ended or its machine is down; last seen at {record.where}"
            for record in known
            if record.rank in silent
        ]
    elif ended:
        guilty = [record.rank for record in ended]
        lines = [f"{record.name} {record.ended} at {record.where}" for record in ended]
    elif missing and all(record.waiting for record in known):
        guilty = missing
        lines = [f"rank {rank} has left no record: it never began this run, or is gone" for rank in missing]
    else:
        least = min(record.place for record in known)
        behind = [record for record in known if record.place == least]
        behind = [record for record in behind if not record.waiting] or behind
        guilty = [record.rank for record in behind]
        lines = [f"{r.name} has not got past {r.where} for {r.idle_s / 60:.3g} min" for r in behind]
    rest = sorted(set(records) - set(guilty) - set(missing))
    if rest:
        names = ", ".join(map(str, rest))
        whom = "it" if len(guilty) == 1 else "them"
        lines.append(f"rank {names} waits for {whom}" if len(rest) == 1 else f"ranks {names} wait for {whom}")
    return "; ".join(lines)
