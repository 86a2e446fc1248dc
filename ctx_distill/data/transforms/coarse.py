"""Sample a scan on a coarse grid along the patient's axes to locate body and lungs in any axis order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ctx_distill.data.io.volume import Volume

AIR = -1024.0
COARSE_MM = 4.0
LUNG_HU = -500.0
"""HU threshold between lung and soft tissue."""

Axes = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Box:
    """A box along the patient's axes, mm: `low` and `high` are (Left, Posterior, Superior)."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]


def scan_box(volume: Volume) -> Box:
    """Return the bounding box of all voxels, including their edges, along the patient's axes."""
    ends = np.array([[-0.5, size - 0.5] for size in volume.voxels.shape])
    corners = np.stack(np.meshgrid(*ends, indexing="ij")).reshape(3, -1)
    points = volume.affine_lps[:3, :3] @ corners + volume.affine_lps[:3, 3:]
    low, high = points.min(axis=1), points.max(axis=1)
    return Box((float(low[0]), float(low[1]), float(low[2])), (float(high[0]), float(high[1]), float(high[2])))


def sample(volume: Volume, points: NDArray[np.float64], outside: float = AIR) -> NDArray[np.float32]:
    """Return values at `points` (3, ...) in LPS mm, and `outside` beyond the scan."""
    from scipy import ndimage

    inverse = np.linalg.inv(volume.affine_lps)
    flat = inverse[:3, :3] @ points.reshape(3, -1) + inverse[:3, 3:]
    # A point in the outer half of a border voxel is still inside that voxel.
    for axis, size in enumerate(volume.voxels.shape):
        inside = (flat[axis] > -0.5 - 1e-6) & (flat[axis] < size - 0.5 + 1e-6)
        flat[axis] = np.where(inside, flat[axis].clip(0, size - 1), flat[axis])
    values = ndimage.map_coordinates(
        volume.voxels, flat, output=np.float32, order=1, mode="constant", cval=outside, prefilter=False
    )
    return np.asarray(values, dtype=np.float32).reshape(points.shape[1:])


def coarse_grid(volume: Volume) -> tuple[NDArray[np.float32], Axes]:
    """Return HU (z, y, x) at 4 mm spacing, and the coordinates in mm along Superior, Posterior, Left."""
    extent = scan_box(volume)
    lines = [np.arange(low + COARSE_MM / 2, high, COARSE_MM) for low, high in zip(extent.low, extent.high, strict=True)]
    left, posterior, superior = (line if len(line) else np.array([extent.low[i]]) for i, line in enumerate(lines))
    grid = np.stack(np.meshgrid(superior, posterior, left, indexing="ij"))[::-1]  # (3 of LPS, z, y, x)
    return sample(volume, grid), (superior, posterior, left)


def body_mask(hu: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return the largest connected tissue component of a coarse grid (z, y, x); empty if there is no tissue."""
    from scipy import ndimage

    tissue = ndimage.binary_opening(hu > LUNG_HU, structure=np.ones((1, 3, 3)))
    parts, count = ndimage.label(tissue)
    if not count:
        return np.asarray(tissue, dtype=np.bool_)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.asarray(parts == int(sizes.argmax()))


def enclosed(air: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the air (z, y, x) that is not connected to the border of its axial slice."""
    from scipy import ndimage

    padded = np.pad(air, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    within = np.zeros((3, 3, 3), dtype=bool)
    within[1] = ndimage.generate_binary_structure(2, 1)
    parts, _ = ndimage.label(padded, structure=within)
    outside = np.isin(parts, np.unique(parts[:, 0, 0]))
    return np.asarray(~outside & padded)[:, 1:-1, 1:-1]
