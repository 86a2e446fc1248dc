"""Stage 4: report decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctx_distill.stages import lazy_exports

if TYPE_CHECKING:
    from ctx_distill.stages.report.task import ReportTask

__all__ = ["ReportTask"]

__getattr__ = lazy_exports(__name__, {"ReportTask": "task"})
