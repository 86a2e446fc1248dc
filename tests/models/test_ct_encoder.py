"""CT encoders: shapes, no batch norm, configuration round trip, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from ctx_distill.models.ct_encoder import CTEncoder, ResNet3D, ViT3D, build_ct_encoder
from ctx_distill.types import EncoderOutput, InputError


def make(index: int) -> tuple[CTEncoder, int, int]:
    """Encoder, D_c and T for volumes of 16 x 32 x 32."""
    if index == 3:
        pytest.importorskip("einops", reason="MONAI's ViT needs einops")
        return ViT3D((16, 32, 32), (8, 8, 8)), 128, 32
    return [
        (ResNet3D("small"), 128, 4),
        (ResNet3D("small", last_stride=2), 128, 1),
        (ResNet3D("small", base_width=8, stem_kernel=3, max_pool=False), 64, 2 * 4 * 4),
    ][index]


@pytest.mark.parametrize("index", range(4))
def test_shapes_norms_and_round_trip(index: int) -> None:
    encoder, width, tokens = make(index)
    volume = torch.randn(2, 1, 16, 32, 32)
    out = encoder.eval()(volume)
    assert out.pooled.shape == (2, width)
    assert out.tokens.shape == (2, tokens, width)
    assert encoder.embed_dim == width
    assert torch.allclose(out.pooled, out.tokens.mean(1))
    assert not [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    config = json.loads(json.dumps(encoder.config()))
    again = build_ct_encoder(config)
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again.eval()(volume).pooled, out.pooled)
    assert again.config() == encoder.config()


@pytest.mark.parametrize("index", range(4))
def test_a_volume_does_not_depend_on_its_batch_and_all_parameters_learn(index: int) -> None:
    encoder, _, _ = make(index)
    volume = torch.randn(3, 1, 16, 32, 32)
    alone = encoder.train()(volume[:1]).pooled
    assert torch.allclose(encoder(volume).pooled[:1], alone, atol=1e-5)
    encoder(volume).tokens.square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    covered = {id(p) for group in encoder.layers() for module in group for p in module.parameters()}
    assert covered == {id(p) for p in encoder.parameters()}


def test_tokens_are_in_depth_row_column_order() -> None:
    encoder = ResNet3D("small", base_width=8, stem_kernel=3, max_pool=False).eval()
    volume = torch.randn(1, 1, 32, 48, 64)
    grid = encoder.stem(volume)
    for stage in encoder.stages:
        grid = stage(grid)
    _, _, depth, rows, columns = grid.shape
    tokens = encoder(volume).tokens[0]
    assert len({depth, rows, columns}) == 3
    for d, r, c in ((0, 0, 0), (0, 0, 2), (0, 2, 1), (depth - 1, 1, 3)):
        assert torch.equal(tokens[(d * rows + r) * columns + c], grid[0, :, d, r, c])


@pytest.mark.parametrize("variant", ["resnet10", "resnet18", "resnet34", "resnet50"])
def test_larger_resnets(variant: Any) -> None:
    encoder = ResNet3D(variant, base_width=8)
    assert encoder(torch.randn(1, 1, 16, 16, 16)).pooled.shape == (1, 256 if variant == "resnet50" else 64)


def test_published_sizes() -> None:
    with torch.device("meta"):
        assert ResNet3D("resnet50").embed_dim == 2048
        pytest.importorskip("einops", reason="MONAI's ViT needs einops")
        vit = ViT3D((96, 192, 192), (16, 16, 16), "vit_b")
    assert sum(p.numel() for p in vit.blocks.parameters()) == pytest.approx(85e6, rel=0.01)


def test_refusals() -> None:
    with pytest.raises(InputError, match="base_width 12 is not a multiple of groups 8"):
        ResNet3D("small", base_width=12)
    with pytest.raises(InputError, match=r"expected \(B, 1, D, H, W\)"):
        ResNet3D("small")(torch.zeros(1, 2, 8, 8, 8))
    with pytest.raises(InputError, match=r"img_size \(16, 32, 30\) is not a multiple of patch_size \(8, 8, 8\)"):
        ViT3D((16, 32, 30))
    pytest.importorskip("einops", reason="MONAI's ViT needs einops")
    with pytest.raises(InputError, match=r"\(16, 16, 16\) voxels, built for \(16, 32, 32\)"):
        ViT3D((16, 32, 32))(torch.zeros(1, 1, 16, 16, 16))


class OwnEncoder(CTEncoder):
    """What somebody may bring along."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed_dim, self.init_args = width, {"width": width}

    def forward(self, volume: torch.Tensor) -> EncoderOutput:
        pooled = volume.new_zeros(len(volume), self.embed_dim)
        return EncoderOutput(pooled, pooled[:, None])


def test_only_ct_encoders_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    own = types.ModuleType("somebodys_encoders")
    own.OwnEncoder = OwnEncoder  # type: ignore[attr-defined]
    config = {"class_path": "somebodys_encoders.OwnEncoder", "init_args": {"width": 3}}
    with pytest.raises(InputError, match="not a CTEncoder"):
        build_ct_encoder(config)  # not imported yet, and not imported here
    monkeypatch.setitem(sys.modules, "somebodys_encoders", own)
    assert build_ct_encoder(config).embed_dim == 3
    for path in (
        "os.system",
        "subprocess.Popen",
        "torch.nn.Linear",
        "ctx_distill.models.ct_encoder.CTEncoder",
        "x",
        "",
    ):
        with pytest.raises(InputError, match="not a CTEncoder"):
            build_ct_encoder({"class_path": path, "init_args": {}})
    with pytest.raises(InputError, match=r"no module ctx_distill\.nothing"):
        build_ct_encoder({"class_path": "ctx_distill.nothing.X"})
    with pytest.raises(InputError, match="arguments do not fit"):
        build_ct_encoder({"class_path": "ctx_distill.models.ct_encoder.ResNet3D", "init_args": {"colour": 1}})


def test_the_gradient_in_bf16_on_a_cpu_is_near_float32_s_though_the_last_stages_have_two_slices() -> None:
    """Of each weight: oneDNN's own gradient there is made of unset memory, on processors that have bf16 instructions."""
    torch.manual_seed(1)
    encoder = ResNet3D("small").train()
    volume = torch.rand(2, 1, 32, 32, 32)
    assert encoder.token_grid((32, 32, 32)).shape[0] == 2
    direction = torch.randn(2, encoder.embed_dim)

    def gradients(bf16: bool) -> dict[str, torch.Tensor]:
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            pooled = encoder(volume).pooled
        torch.autograd.backward((pooled.float() * direction).sum())
        return {
            name: p.grad.flatten().clone()
            for name, p in encoder.named_parameters()
            if p.grad is not None and p.ndim == 5
        }

    expected = gradients(bf16=False)
    for name, found in gradients(bf16=True).items():
        assert torch.cosine_similarity(found, expected[name], dim=0) > 0.9, name
