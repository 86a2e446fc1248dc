"""Augmentation of a batch on its own device: small rigid moves, zoom, intensity and noise, for 2D and 3D alike.

Nothing is mirrored: left and right are findings' places, and reports name them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """How far a batch is varied; zeros leave it as it is.

    Attributes:
        shift: largest move along each axis, as a share of its length.
        scale: largest zoom in or out, as a share.
        rotate: largest turn in the last two axes, in degrees.
        contrast: largest change of contrast, as a share.
        brightness: largest change of brightness, in units of the tensor's own range.
        noise: standard deviation of Gaussian noise, in the same units.
    """

    shift: float = 0.0
    scale: float = 0.0
    rotate: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0
    noise: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Vary a batch (B, C, H, W) or (B, C, D, H, W); each item by its own draw from torch's generator."""
        if self.rotate:
            x = F.grid_sample(x, self._grid(x), mode="bilinear", padding_mode="border", align_corners=False)
        elif self.shift or self.scale:
            x = self._zoom_and_shift(x)
        per_item = (-1, *[1] * (x.ndim - 1))
        if self.contrast or self.brightness:
            contrast = 1 + self.contrast * _uniform(len(x), x)
            x = x * contrast.view(per_item) + (self.brightness * _uniform(len(x), x)).view(per_item)
        if self.noise:
            x = x + self.noise * torch.randn_like(x)
        return x

    def _zoom_and_shift(self, x: Tensor) -> Tensor:
        """The same map as `_grid` without a turn, axis by axis: several times faster than `grid_sample` in 3D."""
        zoom = 1 + self.scale * _uniform(len(x), x)
        axes = []
        for size in x.shape[2:]:
            centres = (2 * torch.arange(size, device=x.device, dtype=x.dtype) + 1) / size - 1
            moved = zoom[:, None] * centres + 2 * self.shift * _uniform(len(x), x)[:, None]
            place = (((moved + 1) * size - 1) / 2).clamp(0, size - 1)
            below = place.floor().long()
            axes.append((below, (below + 1).clamp_max(size - 1), place - below))
        return torch.stack([self._interpolate(item, axes, number) for number, item in enumerate(x)])

    @staticmethod
    def _interpolate(item: Tensor, axes: list[tuple[Tensor, Tensor, Tensor]], number: int) -> Tensor:
        """Linear interpolation of one item (C, ...) along each axis in turn."""
        for axis, (below, above, share) in enumerate(axes, start=1):
            weight = share[number].view(-1, *[1] * (item.ndim - 1 - axis))
            item = torch.lerp(item.index_select(axis, below[number]), item.index_select(axis, above[number]), weight)
        return item

    def _grid(self, x: Tensor) -> Tensor:
        """Sampling grid of a random affine map; its first coordinate is the last axis of x."""
        size, axes = len(x), x.ndim - 2
        theta = torch.zeros(size, axes, axes + 1, device=x.device, dtype=x.dtype)
        zoom = 1 + self.scale * _uniform(size, x)
        angle = math.radians(self.rotate) * _uniform(size, x)
        aspect = x.shape[-2] / x.shape[-1]
        theta[:, 0, 0], theta[:, 0, 1] = zoom * angle.cos(), -zoom * angle.sin() * aspect
        theta[:, 1, 0], theta[:, 1, 1] = zoom * angle.sin() / aspect, zoom * angle.cos()
        if axes == 3:
            theta[:, 2, 2] = zoom
        for axis in range(axes):
            theta[:, axis, axes] = 2 * self.shift * _uniform(size, x)
        return F.affine_grid(theta, list(x.shape), align_corners=False)


def _uniform(size: int, like: Tensor) -> Tensor:
    return torch.rand(size, device=like.device, dtype=like.dtype) * 2 - 1
