"""Refuses a header's claim about size before memory is taken for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ctx_distill.errors import InputError

MAX_VOXELS = 4_000_000_000
# Deflate cannot shrink by more than 1032 : 1 (zlib's technical details), so a file tells how much it can hold at most.
MAX_DEFLATE = 1032


def check_size(path: Path, shape: Sequence[int], item_bytes: int, stored_bytes: int | None, compressed: bool) -> None:
    """Checks the shape that a header claims.

    Args:
        path: the file, for the message.
        shape: voxels along each axis, as claimed.
        item_bytes: bytes a voxel.
        stored_bytes: bytes on disk behind the header, or None where they are spread over other files.
        compressed: whether those bytes are deflated.

    Raises:
        InputError: an empty or absurd shape, or more voxels than the file can hold.
    """
    told = " x ".join(map(str, shape))
    if len(shape) != 3:
        raise InputError(
            f"{path}: {len(shape)} dimensions ({told}); expected 3, split the series into volumes, one file each"
        )
    if min(shape) < 1:
        raise InputError(f"{path}: an empty volume ({told}); expected two or more voxels along each axis")
    voxels = math.prod(shape)
    if voxels > MAX_VOXELS:
        raise InputError(f"{path}: the header claims {told} = {voxels:.3g} voxels; expected at most {MAX_VOXELS:.0e}")
    if stored_bytes is None:
        return
    claimed, room = voxels * item_bytes, stored_bytes * (MAX_DEFLATE if compressed else 1)
    if claimed > room:
        raise InputError(
            f"{path}: the header claims {told} voxels of {item_bytes} bytes = {claimed} bytes, and the file can hold "
            f"at most {room}; it is truncated or its header is wrong, copy it again"
        )
