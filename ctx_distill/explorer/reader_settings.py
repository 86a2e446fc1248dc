"""Settings of the explorer's model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReaderSettings:
    """The model of the explorer.

    Attributes:
        checkpoint: A run folder, or the artefact of a dual encoder or classifier.
        index: Folder of a stage-1 artefact. None: the run's own, if it has one.
        show_reports: Whether reports and images of the pool are shown.
        vocabulary: Findings to predict if the run has none. None: `ct-rate`.
        neighbours: Number of X-rays to show.
        device: `cpu`, `cuda`, or `auto`.
    """

    checkpoint: Path
    index: Path | None = None
    show_reports: bool = False
    vocabulary: str | None = None
    neighbours: int = 6
    device: str = "auto"
