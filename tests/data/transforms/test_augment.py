"""Augmentation moves what it says, by no more than it says, and mirrors nothing."""

from __future__ import annotations

import pytest
import torch

from ctx_distill.data.transforms.augment import Augmentation


@pytest.mark.parametrize("shape", [(2, 3, 32, 40), (2, 1, 16, 32, 40)])
def test_zeros_change_nothing(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(Augmentation().apply(x, range(len(x))), x)


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
    moved = centre_of_mass(Augmentation(shift=0.1).apply(x, range(len(x)))) - centre_of_mass(x)
    assert moved.abs().max() <= 0.1 * 40 + 0.1
    assert moved.abs().max() > 2.0
    assert moved.std(dim=0).min() > 1.0


def test_nothing_is_mirrored() -> None:
    torch.manual_seed(0)
    x = torch.zeros(100, 1, 16, 32, 32)
    x[..., :8] = 1.0
    varied = Augmentation(shift=0.05, scale=0.1, rotate=10.0).apply(x, range(len(x)))
    assert (varied[..., :16].sum(dim=(1, 2, 3, 4)) > varied[..., 16:].sum(dim=(1, 2, 3, 4))).all()


def test_contrast_and_brightness_stay_within_their_bounds() -> None:
    torch.manual_seed(0)
    varied = Augmentation(contrast=0.1, brightness=0.05).apply(torch.ones(200, 1, 2, 2), range(200))
    assert varied.min() >= 1 - 0.1 - 0.05 - 1e-6
    assert varied.max() <= 1 + 0.1 + 0.05 + 1e-6
    assert varied.std() > 0.02


@pytest.mark.parametrize("shape", [(3, 2, 9, 12), (3, 1, 6, 9, 12)])
def test_without_a_turn_it_is_torch_s_affine_sampling(shape: tuple[int, ...]) -> None:
    """A turn too small to see takes the path of `affine_grid`; without one it is separable. Same seeds, same map."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    varied = Augmentation(shift=0.1, scale=0.2).apply(x, [5, 6, 7])
    expected = Augmentation(shift=0.1, scale=0.2, rotate=1e-9).apply(x, [5, 6, 7])
    torch.testing.assert_close(varied, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(varied, x, atol=1e-2)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shift_moves_a_ramp_by_what_the_seed_draws(axis: int) -> None:
    """By hand: on a ramp along an axis, a move by s of its length adds s times its length, away from the border."""
    ramp = torch.arange(40.0).view([-1 if place == axis else 1 for place in range(3)]).expand(40, 40, 40)
    varied = Augmentation(shift=0.1).apply(ramp[None, None], [11])[0, 0] - ramp
    inside = varied[8:-8, 8:-8, 8:-8]
    uniform = torch.rand(7, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    expected = 40 * 0.1 * (2 * uniform[4 + axis] - 1)
    torch.testing.assert_close(inside, expected.float().expand_as(inside), atol=1e-4, rtol=0)


def test_an_item_is_varied_alike_in_whatever_batch() -> None:
    augmentation = Augmentation(shift=0.1, scale=0.1, rotate=5.0, contrast=0.1, brightness=0.1, noise=0.1)
    x = torch.randn(4, 1, 8, 10, 12, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    whole = augmentation.apply(x, [1, 2, 3, 4])
    assert torch.equal(torch.get_rng_state(), before)
    for place in range(4):
        assert torch.equal(augmentation.apply(x[place : place + 1], [place + 1]), whole[place : place + 1])
    assert not torch.equal(augmentation.apply(x, [1, 2, 3, 5])[3], whole[3])
