"""Options of `ctx-distill ablation`. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AblationOptions:
    """What the ablation runs and where its results go.

    Attributes:
        data: Folder of the cohort.
        run: Folder of the runs and the page.
        preset: Sizes and settings of the runs.
        record: Folder of the rows. Rows in it are not run again. Default: RUN.
        arms: Arms to run, as the plan names them. Default: all.
        regimes: Regimes to run, as the plan names them. Default: all.
        seeds: Most seeds per regime. Default: all.
        workers: Processes. Default: one per core.
        again: Rerun finished rows and compare. The recorded rows stay.
        report: Only write the tables and the page from the recorded rows.
        plan: Plan to read. Default: `stages/ablation.yaml`.
    """

    data: Path = Path("runs/ablation/data")
    run: Path = Path("runs/ablation")
    preset: str = "ablation"
    record: Path | None = None
    arms: tuple[str, ...] = ()
    regimes: tuple[str, ...] = ()
    seeds: int | None = None
    workers: int | None = None
    again: bool = False
    report: bool = False
    plan: Path | None = None

    @property
    def record_folder(self) -> Path:
        """Where rows are read and written."""
        return self.record or self.run
