"""From a radiograph in [0, 1] to what an expert's image tower was trained on, in torch and on any device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ctx_distill.types import InputError

Interpolation = Literal["bilinear", "bicubic"]
Resize = Literal["shortest", "longest", "squash", "crop-square"]


@dataclass(frozen=True)
class ImagePreprocessing:
    """Resizing, cropping and normalising, as one declared rule that goes into the expert's fingerprint.

    Resampling is antialiased with the kernels of Pillow, on floats instead of bytes: the result agrees with the
    libraries' own pipelines up to their rounding to 1/255 of the intensity range.

    Attributes:
        size: (h, w) of the output.
        mean: subtracted from the intensity in [0, 1], one value a channel.
        std: divided by, one value a channel.
        interpolation: kernel.
        resize: `shortest` (the short edge to `short_edge`, then a central crop), `longest` (the whole film inside,
            padded), `squash` (aspect ratio not kept), `crop-square` (central square first, then resized).
        short_edge: length of the short edge before the crop; None for the smaller of `size`.
        fill: intensity in [0, 1] of the padding.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bicubic"
    resize: Resize = "shortest"
    short_edge: int | None = None
    fill: float = 0.0

    @property
    def channels(self) -> int:
        """Number of channels of the output."""
        return len(self.mean)

    def describe(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def apply(self, images: Tensor) -> Tensor:
        """Preprocess a batch of radiographs of one size.

        Args:
            images: (B, H, W) in [0, 1], bright where the film is bright (bone).

        Returns:
            (B, C, h, w) float32.
        """
        if images.ndim != 3 or min(images.shape) < 1:
            raise InputError(
                f"radiograph batch of shape {tuple(images.shape)}: expected (B, H, W), one channel, intensities in"
                " [0, 1]. Convert colour images to grey first."
            )
        x = self._fit(images[:, None].float()).clamp(0, 1)
        mean = torch.tensor(self.mean, device=x.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=x.device).view(1, -1, 1, 1)
        return (x - mean) / std

    def _fit(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if self.resize == "squash":
            return self._resample(x, self.size)
        if self.resize == "crop-square":
            edge = min(height, width)
            top, left = height // 2 - edge // 2, width // 2 - edge // 2
            return self._resample(x[..., top : top + edge, left : left + edge], self.size)
        if self.resize == "longest":
            ratio = max(height / self.size[0], width / self.size[1])
            return self._crop_or_pad(self._resample(x, (round(height / ratio), round(width / ratio))))
        if self.size[0] == self.size[1]:
            edge = self.short_edge or self.size[0]
            long_edge = int(edge * max(height, width) / min(height, width))  # truncated, as torchvision does
            return self._crop_or_pad(self._resample(x, (edge, long_edge) if height <= width else (long_edge, edge)))
        ratio = min(height / self.size[0], width / self.size[1])
        return self._crop_or_pad(self._resample(x, (round(height / ratio), round(width / ratio))))

    def _resample(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(x.shape[-2:]) == size:
            return x
        return F.interpolate(x, size=size, mode=self.interpolation, antialias=True, align_corners=False)

    def _crop_or_pad(self, x: Tensor) -> Tensor:
        missing_h, missing_w = (max(want - have, 0) for want, have in zip(self.size, x.shape[-2:]))
        if missing_h or missing_w:
            pads = (missing_w // 2, (missing_w + 1) // 2, missing_h // 2, (missing_h + 1) // 2)
            x = F.pad(x, pads, value=self.fill)
        top, left = (round((have - want) / 2.0) for want, have in zip(self.size, x.shape[-2:]))
        return x[..., top : top + self.size[0], left : left + self.size[1]]
