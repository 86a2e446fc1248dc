"""The run page: one self-contained HTML file that shows what a run did, from its folder alone."""

from __future__ import annotations

from ctx_distill.reporting.run_page import build_page

__all__ = ["build_page"]
