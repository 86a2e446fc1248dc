"""Sample the part of a report that a training step uses."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ctx_distill.text.report_text import sample_sentences


def report_views(reports: Sequence[str], seeds: Sequence[int], share: float) -> list[str]:
    """Return complete reports, or random subsets of their sentences.

    Args:
        reports: b reports.
        seeds: b seeds (`TrainedTask.row_seeds`); a report's view depends on its seed only.
        share: Probability in [0, 1] that a report is reduced to a subset.
    """
    views = []
    for report, seed in zip(reports, seeds, strict=True):
        draw = random.Random(seed)
        views.append(sample_sentences(report, draw) if draw.random() < share else report)
    return views
