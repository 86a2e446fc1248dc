"""What `ctx-distill check` can say of an image, in one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, or may be.

    Attributes:
        severity: `error`: the image must not be trained on; `warning`: somebody should look; `note`: to know.
        code: a short name, the same for all images with this fault.
        text: what was found, in words.
    """

    severity: Severity
    code: str
    text: str
