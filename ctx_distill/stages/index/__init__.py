"""Stage 1: X-ray index and language-guided retrieval."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctx_distill.stages import lazy_exports

if TYPE_CHECKING:
    from ctx_distill.stages.index.task import IndexTask

__all__ = ["IndexTask"]

__getattr__ = lazy_exports(__name__, {"IndexTask": "task"})
