"""What a step of an encoder is made of: floating-point operations and the bytes kept for backward, counted without computing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def encoder_of(name: str, shape: tuple[int, int, int], patch: int) -> Any:
    """A CT encoder of the table by its name.

    Args:
        name: vit_b, resnet50, or tiny ones for tests: vit_tiny, resnet_tiny.
        shape: (D, H, W).
        patch: edge of a ViT's token.
    """
    from ctx_distill.models.ct_encoder import ResNet3D, ViT3D

    if name.startswith("vit"):
        return ViT3D(shape, (patch, patch, patch), "vit_b" if name == "vit_b" else "small")
    return ResNet3D("resnet50") if name == "resnet50" else ResNet3D("small", base_width=8)


def step_flops(encoder: Any, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Operations (a multiplication and an addition are two) of one volume: forward; forward and backward.

    Matrix products, convolutions and attention are counted (`torch.utils.flop_counter`), norms and activations are not;
    nor is what checkpointing computes twice.
    """
    model = encoder.to("meta").train()
    volume = torch.empty(1, 1, *shape, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(volume).pooled.sum()
        forward = counter.get_total_flops()
        loss.backward()
        return forward, counter.get_total_flops()


def kept_bytes(encoder: Any, shape: tuple[int, int, int]) -> int:
    """Bytes that one volume keeps for backward in bfloat16, without attention's (T, T) matrices.

    An estimate: autocast keeps the inputs of norms in float32, and compiled code keeps less.
    """
    model = encoder.to("meta").bfloat16().train()
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    tokens = getattr(getattr(model, "patch_embedding", None), "n_patches", -1)
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in own and x.shape[-2:] != (tokens, tokens):
            kept[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), sdpa_kernel(SDPBackend.MATH):
        output = model(torch.empty(1, 1, *shape, device="meta", dtype=torch.bfloat16))
    del output
    return sum(x.untyped_storage().nbytes() for x in kept.values())
