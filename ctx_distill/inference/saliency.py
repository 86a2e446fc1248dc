"""Saliency of a finding's logit, on the model's grid.

`grad-cam`, for encoders that know the positions of their tokens: HiResCAM (Draelos and Carin 2020), proposed for chest CT,

    S(t) = max(0, sum_c (dL/dA_tc) A_tc),

with the tokens A (T, D_c) and the finding's logit L, interpolated linearly to the voxels. Unlike Grad-CAM it does not
average the gradient over positions, so that it does not highlight what the model did not use.

`gradient`: S(v) = max(0, (dL/dV_v) (V_v - V_air)), gradient times input relative to air (Shrikumar et al. 2017), per voxel,
for all other encoders.

The prior of a dual encoder (the scan's own projection through the X-ray expert) has no depth and is not included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctx_distill.models.ct_encoder import CTEncoder, TokenGrid

Method = Literal["grad-cam", "gradient"]


def method_for(encoder: CTEncoder, shape: tuple[int, int, int]) -> Method:
    """Return `grad-cam` if the encoder knows the positions of its tokens, else `gradient`."""
    return "gradient" if encoder.token_grid(shape) is None else "grad-cam"


def saliency_maps(
    encoder: CTEncoder,
    volume: Tensor,
    logits: Callable[[Tensor], Tensor],
    columns: list[int],
    air: float,
) -> tuple[Method, list[NDArray[np.float32]]]:
    """Compute the saliency of findings in one volume.

    Args:
        encoder: in eval mode.
        volume: (1, 1, D, H, W).
        logits: pooled features (1, D_c) to logits (1, F), differentiable.
        columns: columns of the findings.
        air: value of air in the volume.

    Returns:
        The method, and one (D, H, W) float32 array per finding.
    """
    shape = (int(volume.shape[2]), int(volume.shape[3]), int(volume.shape[4]))
    grid = encoder.token_grid(shape)
    with torch.enable_grad():
        if grid is None:
            voxels = volume.detach().clone().requires_grad_(True)
            found = logits(encoder(voxels).pooled)[0]
            gradients = [torch.autograd.grad(found[c], voxels, retain_graph=True)[0][0, 0] for c in columns]
            return "gradient", [_array((g * (volume[0, 0] - air)).clamp_min(0)) for g in gradients]
        tokens = encoder(volume.detach()).tokens.detach().requires_grad_(True)
        found = logits(tokens.mean(dim=1))[0]
        maps = []
        for column in columns:
            gradient = torch.autograd.grad(found[column], tokens, retain_graph=True)[0]
            places = (gradient * tokens.detach()).sum(dim=-1).clamp_min(0).reshape(grid.shape)
            maps.append(_spread(places, grid, shape))
    return "grad-cam", maps


def _spread(places: Tensor, grid: TokenGrid, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Interpolate token values (d, h, w) linearly to the voxels; beyond the outer tokens their value is repeated."""
    out = places.detach().float().cpu()
    for axis in range(3):
        position = (torch.arange(shape[axis]) - grid.offset[axis]) / grid.step[axis]
        position = position.clamp(0, grid.shape[axis] - 1)
        lower = position.floor().long()
        upper = (lower + 1).clamp_max(grid.shape[axis] - 1)
        view = [-1 if a == axis else 1 for a in range(3)]
        weight = (position - lower).reshape(view)
        out = out.index_select(axis, lower) * (1 - weight) + out.index_select(axis, upper) * weight
    return _array(out)


def _array(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.detach().float().cpu().contiguous().numpy()
    return array
