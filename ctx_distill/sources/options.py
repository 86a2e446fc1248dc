"""Options of the manifest builders; each names the sources that it applies to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class SourceOptions:
    """Options of `ctx-distill manifest`.

    Attributes:
        release: ct-rate: which release. Default: the one that exists.
        reconstructions: ct-rate, dicom: one reconstruction per study, or all.
        labels: rad-chestct: map of its labels.
        english_from_labels: padchest: English sentences generated from its labels, instead of the Spanish reports.
        first_is_frontal: open-i: treat the first image of a report as frontal and the others as lateral.
        reports: dicom: CSV of reports; mimic-cxr: folder of reports.
        key: dicom: file of the secret that ids are hashed with. Default: `~/.config/ctx-distill/key`.
        keep_ids: dicom: keep the ids and dates of the headers.
        convert: dicom: folder for the selected series as NIfTI with hashed names.
        keep_paths: dicom: write paths to the manifest even if they contain a name or id.
        val: Share of patients for val, if the data set has no split.
        test: Share of patients for test, if the data set has no split.
        workers: Processes. Default: one per core.
    """

    release: Literal["first", "fixed"] | None = None
    reconstructions: Literal["one", "all"] = "one"
    labels: Literal["hlip", "radfinder", "own"] = "hlip"
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
