"""What the explorer takes at most."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ctx_distill.errors import InputError

MB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Attributes:
    upload_mb: MB of one upload.
    unpacked_mb: MB of a scan's voxels as stored, and of what a zip unpacks to.
    files: entries of a zip.
    seconds: of receiving one upload, and of reading it and computing.
    idle_minutes: after which a session that nobody asks ends.
    sessions: at one time.
    display_mvoxels: million voxels that the page shows; a larger scan is shown at fewer slices, rows and columns.
    """

    upload_mb: float = 1024
    unpacked_mb: float = 2048
    files: int = 5000
    seconds: float = 300
    idle_minutes: float = 15
    sessions: int = 4
    display_mvoxels: float = 80

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise InputError(
                    f"serve: {field.name} is {getattr(self, field.name)}; expected a number above 0, set it higher"
                )
