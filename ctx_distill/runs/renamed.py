"""Class paths of version 0.1, so that an error on an old file names the new path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ctx_distill.errors import InputError

RENAMED = {
    "ctx_distill.callbacks.progress.EpochProgress": "ctx_distill.training.callbacks.progress_line.EpochProgress",
    "ctx_distill.data.datamodules.CTDataModule": "ctx_distill.data.loading.datamodules.CTDataModule",
    "ctx_distill.data.datamodules.XrayDataModule": "ctx_distill.data.loading.datamodules.XrayDataModule",
    "ctx_distill.tasks.alignment.AlignmentTask": "ctx_distill.stages.align.task.AlignmentTask",
    "ctx_distill.tasks.classification.ClassifierTask": "ctx_distill.stages.classifier.task.ClassifierTask",
    "ctx_distill.tasks.distillation.DistillationTask": "ctx_distill.stages.distill.task.DistillationTask",
    "ctx_distill.tasks.expert.ExpertTask": "ctx_distill.stages.expert.task.ExpertTask",
    "ctx_distill.tasks.indexing.IndexTask": "ctx_distill.stages.index.task.IndexTask",
    "ctx_distill.tasks.projection_zero_shot.ProjectionZeroShotTask": (
        "ctx_distill.stages.zero_shot.projection_baseline.ProjectionZeroShotTask"
    ),
    "ctx_distill.tasks.report_generation.ReportTask": "ctx_distill.stages.report.task.ReportTask",
    "ctx_distill.tasks.zero_shot.ZeroShotTask": "ctx_distill.stages.zero_shot.task.ZeroShotTask",
}
"""Class paths of version 0.1 and their present ones."""


def refuse_renamed(path: Path, layer: Any) -> None:
    """Refuse a configuration layer that names a class of version 0.1.

    Args:
        path: the file of the layer.
        layer: its content.

    Raises:
        InputError: it names one; the message gives the new path.
    """
    for name in _class_paths(layer):
        if name in RENAMED:
            raise InputError(f"{path}: class_path {name} was renamed in version 0.2; write {RENAMED[name]} instead.")


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _class_paths(item)
