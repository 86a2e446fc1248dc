"""Augmentation moves what it says, by no more than it says, and mirrors nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ctx_distill.data.augment import Augmentation


@pytest.mark.parametrize("shape", [(2, 3, 32, 40), (2, 1, 16, 32, 40)])
def test_zeros_change_nothing(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(Augmentation()(x), x)


def centre_of_mass(x: torch.Tensor) -> torch.Tensor:
    """(B, axes) in pixels."""
    axes = range(2, x.ndim)
    grids = torch.meshgrid(*[torch.arange(x.shape[axis], dtype=torch.float32) for axis in axes], indexing="ij")
    mass = x.sum(dim=tuple(range(1, x.ndim)))
    return torch.stack([(x[:, 0] * grid).flatten(1).sum(1) / mass for grid in grids], dim=1)


@pytest.mark.parametrize("shape", [(64, 1, 40, 40), (64, 1, 40, 40, 40)])
def test_a_blob_moves_within_the_bound_and_each_item_by_itself(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.zeros(shape)
    x[(slice(None), slice(None), *[slice(18, 22)] * (len(shape) - 2))] = 1.0
    moved = centre_of_mass(Augmentation(shift=0.1)(x)) - centre_of_mass(x)
    assert moved.abs().max() <= 0.1 * 40 + 0.1
    assert moved.abs().max() > 2.0
    assert moved.std(dim=0).min() > 1.0


def test_nothing_is_mirrored() -> None:
    torch.manual_seed(0)
    x = torch.zeros(100, 1, 16, 32, 32)
    x[..., :8] = 1.0
    varied = Augmentation(shift=0.05, scale=0.1, rotate=10.0)(x)
    assert (varied[..., :16].sum(dim=(1, 2, 3, 4)) > varied[..., 16:].sum(dim=(1, 2, 3, 4))).all()


def test_contrast_and_brightness_stay_within_their_bounds() -> None:
    torch.manual_seed(0)
    varied = Augmentation(contrast=0.1, brightness=0.05)(torch.ones(200, 1, 2, 2))
    assert varied.min() >= 1 - 0.1 - 0.05 - 1e-6
    assert varied.max() <= 1 + 0.1 + 0.05 + 1e-6
    assert varied.std() > 0.02


@pytest.mark.parametrize("shape", [(3, 2, 9, 12), (3, 1, 6, 9, 12)])
def test_without_a_turn_it_is_torch_s_affine_sampling(shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    x = torch.randn(shape)
    torch.manual_seed(4)
    varied = Augmentation(shift=0.1, scale=0.2)(x)
    torch.manual_seed(4)
    zoom = 1 + 0.2 * (2 * torch.rand(3) - 1)
    axes = len(shape) - 2
    theta = torch.zeros(3, axes, axes + 1)
    for axis in range(axes):
        # affine_grid's first coordinate is the last axis
        theta[:, axes - 1 - axis, axes - 1 - axis] = zoom
        theta[:, axes - 1 - axis, axes] = 0.2 * (2 * torch.rand(3) - 1)
    grid = F.affine_grid(theta, list(shape), align_corners=False)
    expected = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    torch.testing.assert_close(varied, expected, atol=1e-5, rtol=1e-5)
