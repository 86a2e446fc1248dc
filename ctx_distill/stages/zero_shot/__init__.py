"""Stage 4: zero-shot findings and retrieval."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctx_distill.stages import lazy_exports

if TYPE_CHECKING:
    from ctx_distill.stages.zero_shot.projection_baseline import ProjectionZeroShotTask
    from ctx_distill.stages.zero_shot.task import Prompts, ZeroShotTask

__all__ = ["ProjectionZeroShotTask", "Prompts", "ZeroShotTask"]

__getattr__ = lazy_exports(
    __name__, {"ProjectionZeroShotTask": "projection_baseline", "Prompts": "task", "ZeroShotTask": "task"}
)
