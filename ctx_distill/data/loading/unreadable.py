"""Volumes that could not be read while training: set aside, replaced, counted, and too many of them end the run."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ctx_distill.errors import InputError
from ctx_distill.files import write_text

log = logging.getLogger(__name__)


Unreadable = tuple[int, str]
"""A row whose image could not be read, and why; a plain tuple, since Lightning takes batches apart to move them."""


@dataclass
class SetAside:
    """The unreadable images that this process has met.

    Attributes:
        rows: number of training rows.
        largest_share: of them that may be unreadable before the run stops.
        reasons: row to reason.
    """

    rows: int
    largest_share: float
    reasons: dict[int, str] = field(default_factory=dict)

    def add(self, found: Sequence[Unreadable], folder: Path | None) -> None:
        """Count what a batch brought along.

        Args:
            found: of the batch; rows that are known already are passed over.
            folder: where `set_aside.csv` is written; None writes nothing.

        Raises:
            InputError: more than the largest share of the rows is unreadable; the message lists them.
        """
        new = [(row, reason) for row, reason in found if row not in self.reasons]
        if not new:
            return
        for row, reason in new:
            self.reasons[row] = reason
            log.warning("set aside, another volume is read in its place: %s", reason)
        if folder is not None:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([("row", "reason"), *sorted(self.reasons.items())])
            write_text(folder / "set_aside.csv", text.getvalue())
        share = len(self.reasons) / self.rows
        if share > self.largest_share:
            told = "\n".join(f"  {reason}" for _, reason in sorted(self.reasons.items())[:20])
            raise InputError(
                f"{len(self.reasons)} of {self.rows} training volumes ({share:.1%}) cannot be read; at most"
                f" {self.largest_share:.1%} may be set aside (data.init_args.unreadable_share). Run ctx-distill check, and leave"
                f" out or repair:\n{told}"
            )
