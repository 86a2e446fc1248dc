"""Limits of the explorer."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ctx_distill.errors import InputError

MB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What the explorer accepts.

    Attributes:
        max_upload_mb: Largest upload, in MB.
        max_unpacked_mb: Largest scan as stored voxels, and largest unpacked zip, in MB.
        max_files: Most files in a zip.
        max_seconds: Longest time to receive an upload, and to read it and compute.
        idle_minutes: Minutes without a request after which a session ends.
        max_sessions: Most sessions at one time.
        max_display_mvoxels: Million voxels shown. A larger scan is shown with fewer slices, rows and columns.
    """

    max_upload_mb: float = 1024
    max_unpacked_mb: float = 2048
    max_files: int = 5000
    max_seconds: float = 300
    idle_minutes: float = 15
    max_sessions: int = 4
    max_display_mvoxels: float = 80

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise InputError(f"serve: {field.name} is {getattr(self, field.name)}; expected a number above 0")
