"""What training does on a GPU alone: bf16 near float32, compiled equal to eager, channels last, memory of checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ctx_distill.losses.cached import encode_cached
from ctx_distill.losses.contrastive import contrastive_loss
from ctx_distill.models.compute import ComputeSettings
from ctx_distill.models.ct_encoder import CTEncoder, ResNet3D, ViT3D

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"),
]
SHAPE = (32, 64, 64)


def make(kind: str) -> CTEncoder:
    torch.manual_seed(1)
    encoder: CTEncoder = ViT3D(SHAPE, variant="small") if kind == "vit" else ResNet3D("small")
    return encoder.to("cuda").train()


def volumes(rows: int) -> Tensor:
    return (torch.rand(rows, 1, *SHAPE, generator=torch.Generator().manual_seed(2)) * 2 - 1).to("cuda")


def step(encoder: CTEncoder, volume: Tensor, bf16: bool, cached: bool = False) -> tuple[Tensor, Tensor]:
    """A contrastive loss and the gradient of all weights, flat."""
    encoder.zero_grad()
    text = torch.randn(len(volume), encoder.embed_dim, generator=torch.Generator().manual_seed(3)).to("cuda")

    def encode(part: Tensor) -> tuple[Tensor, ...]:
        return (encoder(part).pooled,)

    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        (image,) = (
            encode_cached(encode, volume.split(2), encoder.parameters(), torch.device("cuda"))
            if cached
            else encode(volume)
        )
        image, text = torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(text, dim=-1)
        loss = contrastive_loss(image.float(), text, 10.0)["total"]
    torch.autograd.backward(loss)
    return loss.detach(), torch.cat([p.grad.flatten().float() for p in encoder.parameters() if p.grad is not None])


def assert_near(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], rel: float, cosine: float) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=rel, atol=rel)
    assert torch.cosine_similarity(found[1], expected[1], dim=0) > cosine
    assert found[1].norm() == pytest.approx(float(expected[1].norm()), rel=0.1)


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_bf16_step_is_near_float32(kind: str, cached: bool) -> None:
    encoder, volume = make(kind), volumes(8)
    expected = step(encoder, volume, bf16=False)
    assert_near(step(encoder, volume, bf16=True, cached=cached), expected, rel=0.03, cosine=0.98)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_compiled_step_equals_eager(kind: str, bf16: bool) -> None:
    encoder, volume = make(kind), volumes(4)
    compiled = copy.deepcopy(encoder)
    compiled.compute_with(ComputeSettings(compile=True), torch.device("cuda"))
    tolerance: dict[str, Any] = {"rel": 0.03, "cosine": 0.98} if bf16 else {"rel": 1e-3, "cosine": 0.9999}
    assert_near(step(compiled, volume, bf16), step(encoder, volume, bf16), **tolerance)
    assert list(compiled.state_dict()) == list(encoder.state_dict())


def test_a_compiled_convolution_has_its_channels_last() -> None:
    encoder = make("resnet")
    encoder.compute_with(ComputeSettings(compile=True), torch.device("cuda"))
    weights = [p for p in encoder.parameters() if p.ndim == 5 and p.shape[2] > 1 and p.shape[1] > 1]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in weights)


def test_attention_keeps_no_matrix_of_tokens() -> None:
    def peak(shape: tuple[int, int, int]) -> int:
        encoder, volume = ViT3D(shape, variant="small").to("cuda").train(), torch.rand(1, 1, *shape, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            encoder(volume).pooled.sum().backward()
        return torch.cuda.max_memory_allocated() - before

    # 2,048 and 4,096 tokens; matrices of them, 4 heads in each of 4 blocks, would grow fourfold.
    assert peak((128, 128, 128)) < 2.6 * peak((64, 128, 128))


def test_checkpointing_takes_less_memory() -> None:
    def peak(checkpointing: bool) -> int:
        encoder, volume = make("vit"), volumes(16)
        encoder.compute_with(ComputeSettings(checkpointing=checkpointing), torch.device("cuda"))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(encoder, volume, bf16=True)
        return torch.cuda.max_memory_allocated() - before

    assert peak(True) < 0.6 * peak(False)
