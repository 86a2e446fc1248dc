"""Stage 2: distillation of the X-ray expert into the CT encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctx_distill.stages import lazy_exports

if TYPE_CHECKING:
    from ctx_distill.stages.distill.targets import NeighbourSettings, TeacherSettings
    from ctx_distill.stages.distill.task import DistillationSchedule, DistillationTask, DistillationWeights

__all__ = ["DistillationSchedule", "DistillationTask", "DistillationWeights", "NeighbourSettings", "TeacherSettings"]

__getattr__ = lazy_exports(
    __name__,
    {
        "DistillationSchedule": "task",
        "DistillationTask": "task",
        "DistillationWeights": "task",
        "NeighbourSettings": "targets",
        "TeacherSettings": "targets",
    },
)
