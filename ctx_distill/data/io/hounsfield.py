"""Convert stored values to Hounsfield units, and estimate whether values are in HU already.

The estimate relies on every chest CT containing much air and much soft tissue, at known HU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

AIR = (-1100.0, -750.0)
"""HU of the air around a patient and of aerated lung."""
SOFT = (-150.0, 250.0)
"""HU of fat, muscle, blood with and without contrast."""
# Fractions accurate to 1 % need about 10,000 voxels; a scan has about 100 million.
_SAMPLE = 200_000


def sample_voxels(voxels: NDArray[Any]) -> NDArray[np.float32]:
    """Return about 200,000 voxels evenly spaced over a scan, as float32."""
    flat = voxels.reshape(-1)
    # An odd step does not divide the usual row lengths; otherwise the sample would cover only a few columns.
    step = max(1, flat.size // _SAMPLE) | 1
    return flat[::step].astype(np.float32)


def tissue_shares(voxels: NDArray[Any], slope: float = 1.0, intercept: float = 0.0) -> tuple[float, float]:
    """Return the fractions of voxels that are air and soft tissue if `slope * value + intercept` is their HU."""
    values = sample_voxels(voxels) * np.float32(slope) + np.float32(intercept)
    air, soft = (float(((values >= low) & (values <= high)).mean()) for low, high in (AIR, SOFT))
    return air, soft


def to_hounsfield(voxels: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    """Return `slope * voxels + intercept` as int16 if that is lossless, else float32; allocate at most one array."""
    if slope == 1.0 and intercept == 0.0:
        # torch supports only the native byte order.
        return voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
    if voxels.dtype.kind in "iu" and slope == 1.0 and intercept.is_integer():
        low, high = int(voxels.min()) + int(intercept), int(voxels.max()) + int(intercept)
        if low >= -32768 and high <= 32767:  # integers that fit: exact, and half the memory of float32
            # Arithmetic modulo 2^16: the sum is correct even if either operand overflows.
            shifted = voxels.astype(np.int16)
            shifted += np.array(int(intercept) & 0xFFFF, dtype=np.uint16).view(np.int16)
            return shifted
    scaled = voxels.astype(np.float32)
    scaled *= np.float32(slope)
    scaled += np.float32(intercept)
    return scaled
