"""Reject implausible sizes in headers before memory is allocated for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ctx_distill.errors import InputError

MAX_VOXELS = 4_000_000_000
# Deflate compresses by at most 1032 : 1 (zlib's technical details), so the file size bounds the voxel data.
MAX_DEFLATE = 1032


def check_size(path: Path, shape: Sequence[int], item_bytes: int, stored_bytes: int | None, compressed: bool) -> None:
    """Check the shape that a header declares.

    Args:
        path: file, for the message.
        shape: declared voxels along each axis.
        item_bytes: bytes per voxel.
        stored_bytes: bytes on disk that can hold voxels, or None if unknown.
        compressed: whether those bytes are deflated.

    Raises:
        InputError: an empty or implausible shape, or more voxels than the file can hold.
    """
    shape_text = " x ".join(map(str, shape))
    if len(shape) != 3:
        raise InputError(
            f"{path}: {len(shape)} dimensions ({shape_text}); expected 3, split the series into volumes, one file each"
        )
    if min(shape) < 1:
        raise InputError(f"{path}: empty volume ({shape_text}); expected at least two voxels along each axis")
    voxels = math.prod(shape)
    if voxels > MAX_VOXELS:
        raise InputError(
            f"{path}: the header declares {shape_text} = {voxels:.3g} voxels; expected at most {MAX_VOXELS:.0e}"
        )
    if stored_bytes is None:
        return
    declared_bytes, max_bytes = voxels * item_bytes, stored_bytes * (MAX_DEFLATE if compressed else 1)
    if declared_bytes > max_bytes:
        raise InputError(
            f"{path}: the header declares {shape_text} voxels of {item_bytes} bytes = {declared_bytes} bytes, but the file can "
            f"hold at most {max_bytes}; it is truncated or its header is wrong, copy it again"
        )
