"""Stage 4: supervised findings classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctx_distill.stages import lazy_exports

if TYPE_CHECKING:
    from ctx_distill.stages.classifier.loss import LossSettings
    from ctx_distill.stages.classifier.task import ClassifierTask

__all__ = ["ClassifierTask", "LossSettings"]

__getattr__ = lazy_exports(__name__, {"ClassifierTask": "task", "LossSettings": "loss"})
