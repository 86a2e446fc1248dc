"""Train a small X-ray expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctx_distill.stages import lazy_exports

if TYPE_CHECKING:
    from ctx_distill.stages.expert.task import ExpertTask

__all__ = ["ExpertTask"]

__getattr__ = lazy_exports(__name__, {"ExpertTask": "task"})
