"""Status records of the ranks, in a shared folder, and the diagnosis of which ranks the others wait for."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ctx_distill.files import write_json

EARLIER_S = 60.0
"""A record older than this before the start belongs to an earlier run; hosts' clocks differ by less."""


@dataclass(frozen=True)
class RankRecord:
    """The status of one rank.

    Attributes:
        rank: The rank.
        host: Its host name.
        pid: Its process id.
        step: Optimiser steps so far.
        phase: Its activity, such as "train batch 17".
        place: Training batches started in this run, and progress notes since the last one. Ranks with equal progress have
            equal values, even if they validate on different numbers of batches.
        at: Innermost Python line of its main thread.
        waiting: Whether that line is inside torch's collectives or backward.
        idle_s: Seconds since its last progress.
        beat: Number of records written.
        written: Time of writing, seconds since 1970 by its clock.
        ended: Why it stopped; "" while it runs.
        hung: Whether its watchdog stopped it because the run hung.
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
        """The rank, for a message."""
        return f"rank {self.rank} (host {self.host}, process {self.pid})"

    @property
    def where(self) -> str:
        """The position of the rank, for a message."""
        return f"training step {self.step}, {self.phase}, at {self.at}"


def record_file(folder: Path, rank: int) -> Path:
    """Return the path of a rank's record."""
    return folder / f"rank-{rank:05d}.json"


def write_record(folder: Path, record: RankRecord) -> None:
    """Replace the rank's record atomically; write errors are ignored, because they should not stop a run."""
    with contextlib.suppress(OSError):
        write_json(record_file(folder, record.rank), asdict(record))


def read_records(folder: Path, ranks: int, since: float) -> dict[int, RankRecord | None]:
    """Return the record of each rank of the run that began at `since` (seconds since 1970), or None without one."""
    records: dict[int, RankRecord | None] = dict.fromkeys(range(ranks))
    for rank in records:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            values = json.loads(record_file(folder, rank).read_text())
            record = RankRecord(**{**values, "place": tuple(values["place"])})
            records[rank] = record if record.written >= since - EARLIER_S else None
    return records


def explain(records: Mapping[int, RankRecord | None], silent: set[int]) -> str:
    """Return a message that reports which ranks the others wait for.

    These are, in order of precedence: ranks that no longer respond; ranks that ended with an error; ranks without a
    record, if all others wait; else the ranks with the least progress and, among these, those that do not wait in a
    collective. A rank without a record has not started or has finished.

    Args:
        records: Records of all ranks of the run, by rank.
        silent: Ranks that no longer update their record.
    """
    known = [record for record in records.values() if record is not None]
    missing = sorted(set(records) - {record.rank for record in known})
    ended = [record for record in known if record.ended and not record.hung]
    if silent:
        guilty = sorted(silent)
        lines = [
            f"{record.name} does not respond: its process has ended or its machine is down; last seen at {record.where}"
            for record in known
            if record.rank in silent
        ]
    elif ended:
        guilty = [record.rank for record in ended]
        lines = [f"{record.name} {record.ended} at {record.where}" for record in ended]
    elif missing and all(record.waiting for record in known):
        guilty = missing
        lines = [f"rank {rank} has no record: it has not started this run, or has exited" for rank in missing]
    else:
        least = min(record.place for record in known)
        behind = [record for record in known if record.place == least]
        behind = [record for record in behind if not record.waiting] or behind
        guilty = [record.rank for record in behind]
        lines = [f"{r.name} has made no progress for {r.idle_s / 60:.3g} min; it is in {r.where}" for r in behind]
    rest = sorted(set(records) - set(guilty) - set(missing))
    if rest:
        names = ", ".join(map(str, rest))
        whom = "it" if len(guilty) == 1 else "them"
        lines.append(f"rank {names} waits for {whom}" if len(rest) == 1 else f"ranks {names} wait for {whom}")
    return "; ".join(lines)
