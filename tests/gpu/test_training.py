"""How a CT encoder trains on the device: bf16 near float32, compiled equal to eager, channels last, memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ctx_distill.losses.contrastive import contrastive_loss
from ctx_distill.models.compute import ComputeSettings
from ctx_distill.models.ct_encoder import CTEncoder, ResNet3D, ViT3D
from ctx_distill.training.gradient_cache import encode_cached

pytestmark = pytest.mark.gpu
SHAPE = (32, 64, 64)
BF16 = {"rel": 0.03, "cosine": 0.98}
"""Of a loss and a gradient in bf16, whose 8 bits of mantissa round each of some 20 layers by up to 0.4 %."""


def make(kind: str, device: torch.device) -> CTEncoder:
    torch.manual_seed(1)
    encoder: CTEncoder = ViT3D(SHAPE, variant="small") if kind == "vit" else ResNet3D("small")
    return encoder.to(device).train()


def volumes(rows: int, device: torch.device) -> Tensor:
    return (torch.rand(rows, 1, *SHAPE, generator=torch.Generator().manual_seed(2)) * 2 - 1).to(device)


def step(encoder: CTEncoder, volume: Tensor, bf16: bool, cached: bool = False) -> tuple[Tensor, Tensor]:
    """A contrastive loss and the gradient of all weights, flat."""
    encoder.zero_grad()
    text = torch.randn(len(volume), encoder.embed_dim, generator=torch.Generator().manual_seed(3)).to(volume.device)

    def encode(part: Tensor) -> tuple[Tensor, ...]:
        return (encoder(part).pooled,)

    with torch.autocast(volume.device.type, torch.bfloat16, enabled=bf16):
        (image,) = (
            encode_cached(encode, volume.split(2), encoder.parameters(), volume.device) if cached else encode(volume)
        )
        image, text = torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(text, dim=-1)
        loss = contrastive_loss(image.float(), text, 10.0)["total"]
    torch.autograd.backward(loss)
    return loss.detach(), torch.cat([p.grad.flatten().float() for p in encoder.parameters() if p.grad is not None])


def assert_near(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], rel: float, cosine: float) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=rel, atol=rel)
    assert torch.cosine_similarity(found[1], expected[1], dim=0) > cosine
    assert float(found[1].norm()) == pytest.approx(float(expected[1].norm()), rel=0.1)


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_bf16_step_is_near_float32(kind: str, cached: bool, device: torch.device) -> None:
    encoder, volume = make(kind, device), volumes(8, device)
    expected = step(encoder, volume, bf16=False)
    assert_near(step(encoder, volume, bf16=True, cached=cached), expected, **BF16)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_float32_step_is_near_the_cpu_s(kind: str, device: torch.device) -> None:
    """Convolutions may take TF32 on a GPU, whose 11 bits of mantissa round each product by up to 0.05 %."""
    encoder = make(kind, device)
    expected = step(copy.deepcopy(encoder).cpu(), volumes(4, torch.device("cpu")), bf16=False)
    loss, gradient = step(encoder, volumes(4, device), bf16=False)
    assert_near((loss.cpu(), gradient.cpu()), expected, rel=5e-3, cosine=0.999)


@pytest.mark.parametrize(
    ("kind", "bf16", "checkpointing"), [("vit", True, True), ("resnet", True, False), ("resnet", False, True)]
)
def test_a_compiled_step_equals_eager(kind: str, bf16: bool, checkpointing: bool, device: torch.device) -> None:
    encoder, volume = make(kind, device), volumes(4, device)
    compiled = copy.deepcopy(encoder)
    compiled.compute_with(ComputeSettings(compile=True, checkpointing=checkpointing), device)
    tolerance: dict[str, Any] = BF16 if bf16 else {"rel": 1e-3, "cosine": 0.9999}
    assert_near(step(compiled, volume, bf16), step(encoder, volume, bf16), **tolerance)
    assert list(compiled.state_dict()) == list(encoder.state_dict())


def test_channels_last_changes_no_value(device: torch.device) -> None:
    encoder, volume = make("resnet", device), volumes(4, device)
    expected = step(encoder, volume, bf16=False)
    encoder.compute_with(ComputeSettings(channels_last=True), device)
    assert_near(step(encoder, volume, bf16=False), expected, rel=1e-3, cosine=0.999)


def test_a_compiled_convolution_has_its_channels_last_on_a_gpu_alone(device: torch.device) -> None:
    encoder = make("resnet", device)
    encoder.compute_with(ComputeSettings(compile=True), device)
    weights = [p for p in encoder.parameters() if p.ndim == 5 and p.shape[2] > 1 and p.shape[1] > 1]
    assert weights
    inside = [p.is_contiguous(memory_format=torch.channels_last_3d) for p in weights]
    assert all(inside) if device.type == "cuda" else not any(inside)


def test_attention_keeps_no_matrix_of_tokens(device: torch.device, peak_bytes: Callable[..., int]) -> None:
    def peak(shape: tuple[int, int, int]) -> int:
        encoder, volume = ViT3D(shape, variant="small").to(device).train(), torch.rand(1, 1, *shape, device=device)

        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                encoder(volume).pooled.sum().backward()

        return peak_bytes(run)

    # 2,048 and 4,096 tokens; matrices of them, 4 heads in each of 4 blocks, would grow fourfold.
    assert peak((128, 128, 128)) < 2.6 * peak((64, 128, 128))


def test_checkpointing_takes_less_memory(device: torch.device, peak_bytes: Callable[..., int]) -> None:
    def peak(checkpointing: bool) -> int:
        encoder, volume = make("vit", device), volumes(16, device)
        encoder.compute_with(ComputeSettings(checkpointing=checkpointing), device)
        return peak_bytes(lambda: step(encoder, volume, bf16=True))

    assert peak(True) < 0.6 * peak(False)
