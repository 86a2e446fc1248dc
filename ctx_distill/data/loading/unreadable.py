"""Volumes that cannot be read during training: each is replaced and counted, and too many stop the run."""

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
"""Row and reason of an unreadable image; a plain tuple, because Lightning takes batches apart to move them."""


@dataclass
class SetAside:
    """The unreadable images that this process has encountered.

    Attributes:
        rows: number of training rows.
        max_share: max share of unreadable rows before the run stops.
        reasons: reason by row.
    """

    rows: int
    max_share: float
    reasons: dict[int, str] = field(default_factory=dict)

    def add(self, unreadable: Sequence[Unreadable], folder: Path | None) -> None:
        """Count the unreadable images of a batch.

        Args:
            unreadable: unreadable images of the batch; known rows are skipped.
            folder: folder for `set_aside.csv`; None writes nothing.

        Raises:
            InputError: the share of unreadable rows exceeds `max_share`; the message lists them.
        """
        new = [(row, reason) for row, reason in unreadable if row not in self.reasons]
        if not new:
            return
        for row, reason in new:
            self.reasons[row] = reason
            log.warning("skipped an unreadable volume and read another instead: %s", reason)
        if folder is not None:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([("row", "reason"), *sorted(self.reasons.items())])
            write_text(folder / "set_aside.csv", text.getvalue())
        share = len(self.reasons) / self.rows
        if share > self.max_share:
            listing = "\n".join(f"  {reason}" for _, reason in sorted(self.reasons.items())[:20])
            raise InputError(
                f"{len(self.reasons)} of {self.rows} training volumes ({share:.1%}) cannot be read; at most"
                f" {self.max_share:.1%} may be unreadable (data.init_args.unreadable_share). Run ctx-distill check, and"
                f" exclude or repair:\n{listing}"
            )
