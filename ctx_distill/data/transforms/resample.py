"""Resample linearly from a scan's grid to a target grid, with Gaussian smoothing along reduced axes.

Two algorithms give the same values. If the axes of both grids are parallel (nearly every scan), each axis is resampled
separately, on the required voxels only. Otherwise (gantry tilt, oblique reconstructions) it samples trilinearly in slabs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

REDUCTION = 1.5
"""Smooth before reductions by more than this factor."""

_FWHM = 2.0 * math.sqrt(2.0 * math.log(2.0))  # of a Gaussian, in standard deviations
_TRUNCATE = 3.0  # standard deviations
_PARALLEL = 0.02  # source voxels that a "parallel" axis may drift over the whole target
_SLAB = 1 << 20  # target voxels sampled at once by the oblique algorithm: bounds its memory
_EDGE = 0.5 + 1e-6  # the scan ends half a voxel beyond the centres of the outer voxels, whose value extends to the edge


def gaussian_sigma(factor: float, antialias: bool) -> float:
    """Return the sigma in source voxels of the smoothing before a reduction by `factor` (source voxels per step).

    The point spread functions of both grids are modelled as Gaussians with a full width at half maximum of one voxel, as in
    Cardoso et al., "Scale factor point spread function matching" (MICCAI 2015); 0 up to `REDUCTION`.
    """
    return math.sqrt(factor * factor - 1.0) / _FWHM if antialias and factor > REDUCTION else 0.0


def _gaussian(sigma: float) -> NDArray[np.float64]:
    radius = math.ceil(_TRUNCATE * sigma)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2) if sigma else np.ones(1)
    normal: NDArray[np.float64] = weights / weights.sum()
    return normal


@torch.no_grad()
def resample(
    voxels: NDArray[np.int16] | NDArray[np.float32],
    to_source: NDArray[np.float64],
    shape: tuple[int, int, int],
    *,
    outside: float,
    antialias: bool,
    separable: bool | None = None,
) -> Tensor:
    """Sample a volume on a target grid.

    Args:
        voxels: (k0, k1, k2).
        to_source: (4, 4) affine from target index to source index.
        shape: target size.
        outside: value beyond the scan.
        antialias: smooth along the source axes that are reduced by more than `REDUCTION`.
        separable: whether to resample axis by axis; by default wherever it applies.

    Returns:
        Contiguous float32 tensor of size `shape`.
    """
    source = torch.from_numpy(voxels if voxels.flags.writeable else voxels.copy())
    matrix = to_source[:3, :3]
    # For a parallel axis this is its |step|; for an oblique axis, the max movement along it per unit step.
    factors = np.sqrt((matrix**2).sum(axis=1))
    sigmas = [gaussian_sigma(float(f), antialias) for f in factors]
    if separable is None:
        separable = _is_parallel(matrix, shape)
    if separable:
        return _by_axis(source, to_source, shape, sigmas, outside)
    return _oblique(source, to_source, shape, sigmas, outside)


def _is_parallel(matrix: NDArray[np.float64], shape: tuple[int, int, int]) -> bool:
    partner = np.abs(matrix).argmax(axis=1)
    if sorted(partner) != [0, 1, 2]:
        return False
    drift = np.abs(matrix) * np.array(shape)
    drift[np.arange(3), partner] = 0.0
    return bool(drift.sum(axis=1).max() < _PARALLEL)


@dataclass(frozen=True)
class _Taps:
    """Source voxels and weights of each target voxel along one axis; `index` (N, T) counts from `start`."""

    start: int
    stop: int
    index: Tensor
    weight: Tensor
    outside: Tensor  # (n,) the target voxels beyond the scan

    @staticmethod
    def make(size: int, step: float, origin: float, count: int, sigma: float) -> _Taps:
        """Return taps for `size` source and `count` target voxels at origin, origin + step, ... in source voxels."""
        position = origin + step * np.arange(count)
        outside = torch.from_numpy(np.flatnonzero((position < -_EDGE) | (position > size - 1 + _EDGE)))
        position = position.clip(0, size - 1)
        lower = np.floor(position).astype(np.int64)
        fraction = (position - lower)[:, None]
        kernel = np.pad(_gaussian(sigma), 1)  # the two neighbours' kernels, one voxel apart, blended by the fraction
        weight = (1.0 - fraction) * kernel[1:] + fraction * kernel[:-1]
        radius = (len(kernel) - 3) // 2
        index = lower[:, None] + np.arange(-radius, radius + 2)
        index = index.clip(0, size - 1)  # the border is repeated outwards
        start, stop = int(index.min()), int(index.max()) + 1
        return _Taps(start, stop, torch.from_numpy(index - start), torch.from_numpy(weight.astype(np.float32)), outside)

    def rows(self, plane: Tensor) -> Tensor:
        """Apply all taps in one pass: (stop - start, C) float32 to (N, C)."""
        return F.embedding_bag(self.index, plane, mode="sum", per_sample_weights=self.weight)


def _by_axis(
    source: Tensor, to_source: NDArray[np.float64], shape: tuple[int, int, int], sigmas: list[float], outside: float
) -> Tensor:
    partner = np.abs(to_source[:3, :3]).argmax(axis=1)  # source axis -> target axis
    ends = np.array(shape, dtype=np.float64) - 1
    taps = []
    for k, j in enumerate(partner):
        # Distribute the drift of a nearly parallel axis evenly around the target's centre.
        drift = sum(to_source[k, m] * ends[m] / 2 for m in range(3) if m != j)
        origin = float(to_source[k, 3] + drift)
        taps.append(_Taps.make(source.shape[k], float(to_source[k, j]), origin, shape[j], sigmas[k]))
    a, b, c = taps
    cropped = source[a.start : a.stop, b.start : b.stop, c.start : c.stop]

    def in_plane(plane: Tensor) -> Tensor:
        return c.rows(b.rows(plane).t().contiguous())  # (N2, N1): access rows only, never columns

    n0, n1, n2 = len(a.index), len(b.index), len(c.index)
    if len(cropped) <= n0:  # thick slices: fewer planes before than after, so the planes first
        planes = torch.stack([in_plane(plane.float().contiguous()) for plane in cropped])
        out = a.rows(planes.reshape(len(planes), -1)).reshape(n0, n2, n1)
    else:
        out = torch.empty(n0, n2, n1)
        kept: dict[int, Tensor] = {}  # planes as float, from one target plane to the next
        for i, (index, weight) in enumerate(zip(a.index.tolist(), a.weight.tolist())):
            need = {k: 0.0 for k, w in zip(index, weight) if w}
            for k, w in zip(index, weight):
                if w:
                    need[k] += w
            kept = {k: kept[k] if k in kept else cropped[k].float().contiguous() for k in need}
            first, *others = need
            plane = kept[first] * need[first]
            for k in others:
                plane.add_(kept[k], alpha=need[k])
            out[i] = in_plane(plane)
    for dim, tap in ((0, a), (1, c), (2, b)):
        out.index_fill_(dim, tap.outside, outside)
    here = [0, 2, 1]  # the dimension of `out` that holds source axis k
    order = [here[int(np.flatnonzero(partner == j)[0])] for j in range(3)]
    return out.permute(order).contiguous()


def _oblique(
    source: Tensor, to_source: NDArray[np.float64], shape: tuple[int, int, int], sigmas: list[float], outside: float
) -> Tensor:
    out = torch.full(shape, outside, dtype=torch.float32)
    depth = max(1, _SLAB // (shape[1] * shape[2]))
    sizes = np.array(source.shape)
    rows, columns = np.arange(shape[1]), np.arange(shape[2])
    for begin in range(0, shape[0], depth):
        slices = np.arange(begin, min(begin + depth, shape[0]))
        # (d, h, w, 3) source indices, summed axis by axis to avoid a grid of homogeneous coordinates.
        position = (
            (slices[:, None, None, None] * to_source[:3, 0] + rows[:, None, None] * to_source[:3, 1])
            + columns[:, None] * to_source[:3, 2]
            + to_source[:3, 3]
        )
        inside = ((position >= -_EDGE) & (position <= sizes - 1 + _EDGE)).all(axis=-1)
        if not inside.any():
            continue
        position = position.clip(0, sizes - 1)
        reached = position[inside]
        radius = np.array([len(_gaussian(s)) // 2 for s in sigmas])
        start = np.maximum(np.floor(reached.min(axis=0)).astype(int) - radius, 0)
        stop = np.minimum(np.floor(reached.max(axis=0)).astype(int) + 2 + radius, sizes)
        start = np.minimum(start, stop - 2)  # at least two voxels, to have a distance between them
        crop = source[start[0] : stop[0], start[1] : stop[1], start[2] : stop[2]].float()
        for axis, sigma in enumerate(sigmas):
            if sigma:
                crop = _smooth(crop, axis, sigma)
        # grid_sample coordinates run from -1 to 1, last axis first.
        grid = torch.from_numpy(
            (2.0 * (position - start) / (stop - start - 1) - 1.0).astype(np.float32)[..., ::-1].copy()
        )
        sampled = F.grid_sample(
            crop[None, None], grid[None], mode="bilinear", padding_mode="border", align_corners=True
        )
        mask = torch.from_numpy(inside)
        out[begin : begin + len(slices)][mask] = sampled[0, 0][mask]
    return out


def _smooth(crop: Tensor, axis: int, sigma: float) -> Tensor:
    kernel = _gaussian(sigma)
    radius, length = len(kernel) // 2, crop.shape[axis]
    ends = [crop.narrow(axis, at, 1) for at in (0, length - 1)]
    padded = torch.cat([ends[0]] * radius + [crop] + [ends[1]] * radius, dim=axis)  # the border is repeated outwards
    out = torch.zeros_like(crop)
    for at, weight in enumerate(kernel.tolist()):
        out.add_(padded.narrow(axis, at, length), alpha=weight)
    return out
