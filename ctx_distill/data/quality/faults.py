"""The findings of `ctx-distill check` about an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Fault:
    """An actual or possible problem of an image.

    Attributes:
        severity: `error` (do not train on the image), `warning` (needs review) or `note` (for information).
        code: short name, equal for all images with this fault.
        text: description of the problem.
    """

    severity: Severity
    code: str
    text: str
