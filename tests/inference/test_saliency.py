"""Saliency against what is known by hand: its values, and where a lesion lands in a scan of any orientation."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.inference.model import CTModel
from ctx_distill.inference.parts import Asked, Classifier, Parts
from ctx_distill.inference.saliency import saliency_maps
from ctx_distill.models.ct_encoder import CTEncoder, ResNet3D, TokenGrid, ViT3D
from ctx_distill.models.heads import FindingsHead
from ctx_distill.types import EncoderOutput

SHAPE = (24, 28, 32)


class Bright(CTEncoder):
    """Its tokens are the means of 2 x 2 x 2 cubes, squared: d pooled / d voxel is known by hand."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.embed_dim, self.init_args, self.placed = 1, {}, tokens

    def forward(self, volume: Tensor) -> EncoderOutput:
        cubes = torch.nn.functional.avg_pool3d(volume + 1, 2)
        tokens = (cubes**2).flatten(2).transpose(1, 2)
        return EncoderOutput(pooled=tokens.mean(dim=1), tokens=tokens)

    def token_grid(self, shape: tuple[int, int, int]) -> TokenGrid | None:
        if not self.placed:
            return None
        return TokenGrid((shape[0] // 2, shape[1] // 2, shape[2] // 2), (2, 2, 2), (0.5, 0.5, 0.5))


def identity(pooled: Tensor) -> Tensor:
    return pooled


def test_values_by_hand() -> None:
    volume = torch.full((1, 1, 4, 4, 4), -1.0)
    volume[0, 0, :2, :2, :2] = torch.tensor([0.0, 1.0])  # a cube's mean is 1.5 above air
    _, (gradient,) = saliency_maps(Bright(False), volume, identity, [0], -1.0)
    # pooled = mean of 8 cubes m^2; d/dv = 2 m / 8 / 8, times v - air
    np.testing.assert_allclose(gradient[0, 0, :2], 2 * 1.5 / 64 * np.array([1.0, 2.0]), rtol=1e-6)
    assert gradient[2:].max() == 0
    _, (cam,) = saliency_maps(Bright(True), volume, identity, [0], -1.0)
    at = 1.5**2 / 8  # d pooled / d token is 1/8, the token m^2
    # between centres 0.5 and 2.5 linearly, before the first its value
    np.testing.assert_allclose(cam[0, 0], at * np.array([1, 0.75, 0.25, 0]), rtol=1e-6)


class Probe(FindingsHead):
    """The pooled feature itself."""

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled


def bright_model(tokens: bool) -> CTModel:
    spec = VolumeSpec((3.0, 3.0, 3.0), SHAPE, window=(-1000.0, 1000.0))
    classifier = Classifier(("lesion",), Probe(1, 1), Bright(tokens), artefact=None)  # type: ignore[arg-type]
    return CTModel(Parts(Path("by hand"), spec, None, None, None, Asked(()), classifier, None, None))


def rotation(axis: int, degrees: float) -> np.ndarray:
    a, b = [i for i in range(3) if i != axis]
    turn = np.eye(3)
    turn[[a, a, b, b], [a, b, a, b]] = np.array([1, -1, 1, 1]) * [
        np.cos(np.radians(degrees)), np.sin(np.radians(degrees)), np.sin(np.radians(degrees)), np.cos(np.radians(degrees)),
    ]  # fmt: skip
    return turn


GEOMETRIES = {
    "LAS": np.diag([-2.0, 2.0, 2.5]),
    "RAS": np.diag([2.0, 2.0, 2.5]),
    "LPI": np.diag([-2.0, -2.0, -2.5]),
    "permuted": np.array([[0, 0, 2.5], [2.0, 0, 0], [0, -2.0, 0]]),
    "oblique": rotation(0, 20) @ rotation(2, -15) @ np.diag([-2.0, -2.0, 2.5]),
    "tilted and permuted": rotation(1, 25) @ np.array([[0, 2.5, 0], [0, 0, -2.0], [2.0, 0, 0]]),
}


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_a_lesion_lands_in_its_voxels(name: str, tokens: bool, tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[:3, :3] = GEOMETRIES[name]
    affine[:3, 3] = [11.0, -37.0, 250.0]
    voxels = np.full((38, 34, 30), -1000, dtype=np.int16)
    lesion = (slice(22, 26), slice(8, 12), slice(17, 21))
    voxels[lesion] = 1000
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "scan.nii.gz")
    found = bright_model(tokens).predict(tmp_path / "scan.nii.gz", saliency=True)
    found.saliency["lesion"].write(tmp_path / "map.nii.gz")
    written = nib.load(tmp_path / "map.nii.gz")
    assert written.shape == voxels.shape
    np.testing.assert_array_equal(written.affine, nib.load(tmp_path / "scan.nii.gz").affine)
    values = written.get_fdata()
    peak = np.unravel_index(values.argmax(), values.shape)
    centre = np.array([23.5, 9.5, 18.5])
    assert np.abs(peak - centre).max() <= 1.5, peak  # inside the lesion
    mass = np.array([(values * at).sum() for at in np.indices(values.shape)]) / values.sum()
    np.testing.assert_allclose(mass, centre, atol=0.6)


@pytest.mark.parametrize(
    "encoder",
    [
        ResNet3D("small", base_width=8),
        ResNet3D("small", base_width=8, stem_kernel=3, stem_stride=1, max_pool=False, last_stride=2),
        ViT3D((32, 40, 48), (8, 8, 16)),
    ],
    ids=["resnet", "fine resnet", "vit"],
)
def test_tokens_lie_where_the_encoder_says(encoder: CTEncoder) -> None:
    shape = (32, 40, 48)
    grid = encoder.eval().token_grid(shape)
    assert grid is not None
    volume = torch.randn(1, 1, *shape, requires_grad=True)
    if isinstance(encoder, ViT3D):
        tokens = encoder.patch_embedding(volume)  # before attention: a token sees its own patch alone
    else:
        tokens = encoder(volume).tokens
    assert tokens.shape[1] == np.prod(grid.shape)
    place = tuple(n // 2 for n in grid.shape)
    at = int(np.ravel_multi_index(place, grid.shape))
    if isinstance(encoder, ViT3D):
        seen = torch.autograd.grad(tokens[0, at].sum(), volume)[0][0, 0].abs().numpy() > 0
        middle = [
            (np.flatnonzero(seen.any(axis=tuple(b for b in range(3) if b != a)))[[0, -1]]).mean() for a in range(3)
        ]
        expected = [grid.offset[a] + grid.step[a] * place[a] for a in range(3)]
        assert middle == expected
    else:
        counts = tuple(-(-n // s) for n, s in zip(shape, grid.step, strict=True))
        assert grid.shape == counts
        small = encoder.stem(torch.zeros(1, 1, *shape))
        assert small.shape[2:] == tuple(
            -(-n // (encoder.init_args["stem_stride"] * (2 if encoder.init_args["max_pool"] else 1))) for n in shape
        )
