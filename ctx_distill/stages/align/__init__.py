"""Stage 3: robust contrastive alignment of CT and report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctx_distill.stages import lazy_exports

if TYPE_CHECKING:
    from ctx_distill.stages.align.distillation_regulariser import DistillationRegulariserSettings
    from ctx_distill.stages.align.entity_masking import MaskingSettings
    from ctx_distill.stages.align.evidence import RobustSettings
    from ctx_distill.stages.align.objective import SoftTargetSettings
    from ctx_distill.stages.align.report_tower import TextSettings
    from ctx_distill.stages.align.task import AlignmentTask

__all__ = [
    "AlignmentTask",
    "DistillationRegulariserSettings",
    "MaskingSettings",
    "RobustSettings",
    "SoftTargetSettings",
    "TextSettings",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "AlignmentTask": "task",
        "DistillationRegulariserSettings": "distillation_regulariser",
        "MaskingSettings": "entity_masking",
        "RobustSettings": "evidence",
        "SoftTargetSettings": "objective",
        "TextSettings": "report_tower",
    },
)
