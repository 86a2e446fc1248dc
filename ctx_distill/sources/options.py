"""What a user can ask of a manifest builder; each source says which of them it listens to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class SourceOptions:
    """Options of `ctx-distill manifest`.

    Attributes:
        release: CT-RATE: `first` or `fixed`; None looks which is there.
        reconstructions: CT-RATE and DICOM: `one` a study by the source's rule, or `all`.
        labels: Rad-ChestCT: the map of its labels, by name.
        english_from_labels: PadChest: English sentences made from its labels in place of the Spanish reports.
        first_is_frontal: Open-I: take a report's first picture as frontal and the others as lateral.
        reports: DICOM: a CSV of reports.
        key: DICOM: the file of the secret that ids are hashed with.
        keep_ids: DICOM: ids and dates as they stand in the headers.
        convert: DICOM: a folder to write the chosen series to, as NIfTI under hashed names.
        keep_paths: DICOM: write paths into the manifest although they hold a name or id.
        val: share of patients for val where the set has no split.
        test: likewise for test.
        workers: processes; None takes one a core.
    """

    release: Literal["first", "fixed"] | None = None
    reconstructions: Literal["one", "all"] = "one"
    labels: str = "hlip"
    english_from_labels: bool = False
    first_is_frontal: bool = False
    reports: Path | None = None
    key: Path | None = None
    keep_ids: bool = False
    convert: Path | None = None
    keep_paths: bool = False
    val: float = 0.1
    test: float = 0.1
    workers: int | None = None
