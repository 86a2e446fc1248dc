"""A volume in HU and the brushes that paint it: soft ellipsoids, tubes and splatted points.

Coordinates are millimetres in the patient's own frame, ordered (z, y, x) and growing towards Superior, Posterior and
Left. A brush works only inside the bounding box of what it paints, and its edge is one voxel soft, so that thin
structures keep their mass on coarse grids: a projection of a hard-edged coarse volume shows contour lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Numbers = NDArray[np.floating[Any]]
Slices = tuple[slice, slice, slice]
Point = tuple[float, float, float]


@dataclass(frozen=True)
class Grid:
    """A regular grid around the patient's origin.

    Attributes:
        shape: (D, H, W) voxels.
        spacing: (z, y, x) mm.
        centre: (z, y, x) mm, the patient's point in the grid's middle.
        yaw: radians by which the patient is turned about the long axis of the body.
    """

    shape: tuple[int, int, int]
    spacing: Point
    centre: Point = (0.0, 0.0, 0.0)
    yaw: float = 0.0

    def axis(self, index: int) -> Array:
        """Positions (n,) in mm along one axis of the grid, relative to its middle."""
        count = self.shape[index]
        return ((np.arange(count) - (count - 1) / 2) * self.spacing[index]).astype(np.float32)

    def to_grid(self, points: Numbers) -> NDArray[np.float64]:
        """Patient points (n, 3) in mm to fractional voxel indices (n, 3)."""
        moved = np.asarray(points, np.float64) - np.asarray(self.centre)
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        turned = np.stack(
            [moved[:, 0], cos * moved[:, 1] + sin * moved[:, 2], cos * moved[:, 2] - sin * moved[:, 1]], axis=1
        )
        return np.asarray(turned / np.asarray(self.spacing) + (np.asarray(self.shape) - 1) / 2)


class Canvas:
    """A volume being painted.

    Attributes:
        hu: (D, H, W) float32 in HU, air where nothing was painted.
        lung: (D, H, W) float32, the fraction of each voxel that is lung; a solid stroke takes its share away.
        z: (D, 1, 1) mm; y, x: (1, H, W) mm, fields because the patient may be turned.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.hu: Array = np.full(grid.shape, -1000.0, np.float32)
        self.lung: Array = np.zeros(grid.shape, np.float32)
        self.soft = float(np.cbrt(np.prod(grid.spacing)))
        cos, sin = np.float32(math.cos(grid.yaw)), np.float32(math.sin(grid.yaw))
        across, along = grid.axis(2)[None, None, :], grid.axis(1)[None, :, None]
        self.z: Array = grid.axis(0)[:, None, None] + np.float32(grid.centre[0])
        self.y: Array = cos * along - sin * across + np.float32(grid.centre[1])
        self.x: Array = cos * across + sin * along + np.float32(grid.centre[2])

    def box(self, low: Sequence[float] | Numbers, high: Sequence[float] | Numbers) -> Slices | None:
        """Slices of the voxels that hold the patient's box from `low` to `high` (z, y, x mm); None when outside."""
        corners = np.array([[z, y, x] for z in (low[0], high[0]) for y in (low[1], high[1]) for x in (low[2], high[2])])
        index = self.grid.to_grid(corners)
        start = np.maximum(np.floor(index.min(axis=0)).astype(int) - 1, 0)
        stop = np.minimum(np.ceil(index.max(axis=0)).astype(int) + 2, self.grid.shape)
        if (stop <= start).any():
            return None
        return (slice(start[0], stop[0]), slice(start[1], stop[1]), slice(start[2], stop[2]))

    def coordinates(self, at: Slices) -> tuple[Array, Array, Array]:
        """z (d, 1, 1), y (1, h, w) and x (1, h, w) in mm of a box."""
        return self.z[at[0]], self.y[:, at[1], at[2]], self.x[:, at[1], at[2]]

    def edge(self, depth: Array) -> Array:
        """Coverage 0..1 from a signed depth in mm (positive inside)."""
        cover = depth / np.float32(self.soft)
        cover += np.float32(0.5)
        return np.clip(cover, 0, 1, out=cover)

    def blend(self, at: Slices, cover: Array, value: float | Array, solid: bool = True) -> None:
        """Moves the HU of a box towards `value` by `cover` (0..1); a solid stroke also takes the lung away."""
        part = self.hu[at]
        part += cover * (np.float32(value) - part if isinstance(value, float | int) else value - part)
        if solid:
            self.lung[at] *= 1 - cover

    def cover_ellipsoid(self, centre: Point, radii: Point, axes: Numbers | None = None) -> tuple[Slices, Array] | None:
        """Coverage of an ellipsoid in its box.

        Args:
            centre: (z, y, x) mm.
            radii: semi-axes in mm, along z, y, x or along the rows of `axes`.
            axes: (3, 3) orthonormal rows in (z, y, x); None for the patient's axes.
        """
        if axes is None:
            reach = np.asarray(radii)
        else:
            reach = np.sqrt(((np.asarray(radii)[:, None] * axes) ** 2).sum(axis=0))
        reach = reach + self.soft
        at = self.box(np.asarray(centre) - reach, np.asarray(centre) + reach)
        if at is None:
            return None
        z, y, x = self.coordinates(at)
        z, y, x = z - np.float32(centre[0]), y - np.float32(centre[1]), x - np.float32(centre[2])
        if axes is None:
            square = (z / np.float32(radii[0])) ** 2 + (
                (y / np.float32(radii[1])) ** 2 + (x / np.float32(radii[2])) ** 2
            )
        else:
            square = np.zeros(np.broadcast_shapes(z.shape, y.shape), np.float32)
            for row, radius in zip(axes.astype(np.float32), radii, strict=True):
                along = z * (row[0] / np.float32(radius)) + (y * row[1] + x * row[2]) / np.float32(radius)
                square += along * along
        depth = np.float32(min(radii)) * (1 - np.sqrt(square))
        return at, self.edge(depth)

    def ellipsoid(
        self,
        centre: Point,
        radii: Point,
        value: float,
        axes: Numbers | None = None,
        solid: bool = True,
        within_lung: bool = False,
    ) -> None:
        """Paints an ellipsoid (see `cover_ellipsoid`) of `value` HU; `within_lung` keeps it to what is still lung."""
        found = self.cover_ellipsoid(centre, radii, axes)
        if found is None:
            return
        at, cover = found
        self.blend(at, cover * self.lung[at] if within_lung else cover, value, solid)

    def tube(self, points: Sequence[Point], radii: Sequence[float], value: float, solid: bool = True) -> None:
        """Paints a polyline (z, y, x mm) with a radius (mm) at each of its points."""
        for start, end, first, last in zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True):
            a, b = np.asarray(start, np.float32), np.asarray(end, np.float32)
            reach = max(first, last) + self.soft
            at = self.box(np.minimum(a, b) - reach, np.maximum(a, b) + reach)
            if at is None:
                continue
            z, y, x = self.coordinates(at)
            z, y, x = z - a[0], y - a[1], x - a[2]
            step = b - a
            length = np.float32(max(float(step @ step), 1e-6))
            t = np.clip((z * step[0] + (y * step[1] + x * step[2])) / length, 0, 1)
            distance = np.sqrt((z - t * step[0]) ** 2 + (y - t * step[1]) ** 2 + (x - t * step[2]) ** 2)
            self.blend(at, self.edge(np.float32(first) + t * np.float32(last - first) - distance), value, solid)

    def splat(self, points: Numbers, volumes: Numbers) -> Array:
        """The fraction (D, H, W) of each voxel that points (n, 3) of the given volumes (n,) in mm3 fill, at most 1."""
        index = self.grid.to_grid(points)
        shape = self.grid.shape
        inside = ((index >= 0) & (index < np.asarray(shape) - 1)).all(axis=1)
        index, volumes = index[inside], np.asarray(volumes)[inside] / float(np.prod(self.grid.spacing))
        base = index.astype(np.int64)
        part = index - base
        flat = (base[:, 0] * shape[1] + base[:, 1]) * shape[2] + base[:, 2]
        places, weights = [], []
        for dz in (0, 1):
            wz = volumes * (part[:, 0] if dz else 1 - part[:, 0])
            for dy in (0, 1):
                wy = wz * (part[:, 1] if dy else 1 - part[:, 1])
                for dx in (0, 1):
                    places.append(flat + ((dz * shape[1] + dy) * shape[2] + dx))
                    weights.append(wy * (part[:, 2] if dx else 1 - part[:, 2]))
        filled = np.bincount(np.concatenate(places), np.concatenate(weights), minlength=math.prod(shape))
        return np.minimum(filled, 1).astype(np.float32).reshape(shape)
