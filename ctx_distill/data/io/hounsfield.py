"""Hounsfield units: how stored values become them, and whether values are: every chest CT holds much air and much soft
tissue, at known numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

AIR = (-1100.0, -750.0)
"""HU of the air around a patient and of aerated lung."""
SOFT = (-150.0, 250.0)
"""HU of fat, muscle, blood with and without contrast."""
# Every n-th voxel: shares to a percent need ten thousand of them, and a scan has a hundred million.
_SAMPLE = 200_000


def sample_voxels(voxels: NDArray[Any]) -> NDArray[np.float32]:
    """Some 200,000 voxels evenly spread over a scan, as float32."""
    flat = voxels.reshape(-1)
    # An odd step that no row length divides, or the sample would be a few columns of the picture.
    step = max(1, flat.size // _SAMPLE) | 1
    return flat[::step].astype(np.float32)


def tissue_shares(voxels: NDArray[Any], slope: float = 1.0, intercept: float = 0.0) -> tuple[float, float]:
    """The shares of voxels that would be air and soft tissue, were `slope * value + intercept` their HU."""
    values = sample_voxels(voxels) * np.float32(slope) + np.float32(intercept)
    air, soft = (float(((values >= low) & (values <= high)).mean()) for low, high in (AIR, SOFT))
    return air, soft


def to_hounsfield(voxels: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    """`slope * voxels + intercept`, in int16 where nothing is lost by it, else float32; one array is made at most."""
    if slope == 1.0 and intercept == 0.0:
        # Byte order: torch knows only the machine's own.
        return voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
    if voxels.dtype.kind in "iu" and slope == 1.0 and intercept.is_integer():
        low, high = int(voxels.min()) + int(intercept), int(voxels.max()) + int(intercept)
        if low >= -32768 and high <= 32767:  # whole HU that fit: half the memory of float32, and exact
            # Modulo 2^16, in which the sum is right whatever either part was cut to.
            shifted = voxels.astype(np.int16)
            shifted += np.array(int(intercept) & 0xFFFF, dtype=np.uint16).view(np.int16)
            return shifted
    scaled = voxels.astype(np.float32)
    scaled *= np.float32(slope)
    scaled += np.float32(intercept)
    return scaled
