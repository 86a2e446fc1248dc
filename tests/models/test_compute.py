"""How CT encoders are computed: checkpointing, compiling and memory formats change no gradient and no artefact."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctx_distill.models.compute import ComputeSettings
from ctx_distill.models.ct_encoder import CTEncoder, ResNet3D, ViT3D
from ctx_distill.models.dual_encoder import load_ct_encoder, save_ct_encoder
from ctx_distill.models.heads import ProjectionHead
from ctx_distill.training.gradient_cache import encode_cached

CPU = torch.device("cpu")
SHAPE = (16, 32, 32)


def make(kind: str, dropout: float = 0.0) -> CTEncoder:
    torch.manual_seed(1)
    if kind == "resnet":
        return ResNet3D("small", base_width=8)
    pytest.importorskip("einops", reason="MONAI's ViT needs einops")
    return ViT3D(SHAPE, variant="small", dropout=dropout)


def volumes(rows: int) -> Tensor:
    return torch.rand(rows, 1, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1


def gradients(encoder: CTEncoder, volume: Tensor, cached: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of something that needs pooled and tokens of all rows."""
    encoder.zero_grad()
    torch.manual_seed(3)

    def encode(part: Tensor) -> tuple[Tensor, ...]:
        output = encoder(part)
        return output.pooled, output.tokens

    if cached:
        pooled, tokens = encode_cached(encode, volume.split(2), encoder.parameters(), CPU)
    else:
        pooled, tokens = encode(volume)
    loss = (pooled @ pooled.T).logsumexp(1).sum() + tokens.square().mean()
    torch.autograd.backward(loss)
    return loss.detach(), {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


class Count:
    """Forwards of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.forwards = 0
        module.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.forwards += 1


def inner(encoder: CTEncoder) -> nn.Module:
    """A module inside the first block: hooks of the block itself would not see it run again."""
    block = encoder.blocks[0].norm1 if isinstance(encoder, ViT3D) else encoder.stages[0][0].conv1
    assert isinstance(block, nn.Module)
    return block


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize(("kind", "dropout"), [("resnet", 0.0), ("vit", 0.0), ("vit", 0.1)])
def test_checkpointing_changes_no_gradient(kind: str, dropout: float, cached: bool) -> None:
    encoder, volume = make(kind, dropout).double().train(), volumes(4)
    keeps = Count(inner(encoder))
    expected = gradients(encoder, volume, cached)
    again = copy.deepcopy(encoder)
    again.compute_with(ComputeSettings(checkpointing=True), CPU)
    repeats = Count(inner(again))
    loss, found = gradients(again, volume, cached)
    assert repeats.forwards - keeps.forwards == (2 if cached else 1)
    torch.testing.assert_close(loss, expected[0], rtol=0, atol=1e-12)
    assert found.keys() == expected[1].keys() == dict(encoder.named_parameters()).keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=0, atol=1e-12)


def test_checkpointing_keeps_less_for_backward() -> None:
    def kept(checkpointing: bool) -> int:
        encoder = make("vit").double().train()
        encoder.compute_with(ComputeSettings(checkpointing=checkpointing), CPU)
        found: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = encoder(volumes(4))
        parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
        del output
        return sum(size for place, size in found.items() if place not in parameters)

    assert kept(True) < kept(False) / 3


def test_evaluation_is_neither_checkpointed_nor_compiled() -> None:
    encoder = make("vit").eval()
    encoder.compute_with(ComputeSettings(checkpointing=True, compile=True), CPU)
    counted = Count(inner(encoder))
    output = encoder(volumes(1).float())
    output.pooled.sum().backward()
    assert counted.forwards == 1  # and nothing was compiled, which would have taken a C++ compiler and seconds


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_an_artefact_does_not_tell_how_its_encoder_was_computed(kind: str, tmp_path: Path) -> None:
    plain = make(kind)
    head = ProjectionHead(plain.embed_dim, 4)
    other = copy.deepcopy(plain)
    other.compute_with(ComputeSettings(checkpointing=True, compile=True, channels_last=True), CPU)
    assert list(other.state_dict()) == list(plain.state_dict())
    assert other.config() == plain.config()
    first = save_ct_encoder(tmp_path / "a", plain, head, {}, {})
    second = save_ct_encoder(tmp_path / "b", other, head, {}, {})
    assert first.fingerprint == second.fingerprint
    again, _, _ = load_ct_encoder(tmp_path / "b")
    torch.testing.assert_close(again(volumes(2).float()).pooled, plain.eval()(volumes(2).float()).pooled)


def test_channels_last_changes_no_gradient_and_is_chosen_for_compiled_convolutions_on_a_gpu() -> None:
    encoder, volume = make("resnet").double().train(), volumes(2)
    expected = gradients(encoder, volume, False)
    other = copy.deepcopy(encoder)
    other.compute_with(ComputeSettings(channels_last=True), CPU)
    seen: list[Tensor] = []
    other.stem.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss, found = gradients(other, volume, False)
    assert seen[0].is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(loss, expected[0], rtol=0, atol=1e-12)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=0, atol=1e-12)

    def chosen(kind: str, device: str, compiled: bool) -> bool:
        encoder = make(kind)
        encoder.compute_with(ComputeSettings(compile=compiled), torch.device(device))
        return encoder._channels_last

    assert chosen("resnet", "cuda", True)
    assert not chosen("resnet", "cuda", False)
    assert not chosen("resnet", "cpu", True)
    assert not chosen("vit", "cuda", True)


def test_attention_is_monais() -> None:
    pytest.importorskip("einops", reason="MONAI's ViT needs einops")
    from monai.networks.blocks import SABlock

    from ctx_distill.models.ct_encoder import _Attention

    torch.manual_seed(4)
    theirs = SABlock(32, 4, 0.3, qkv_bias=True).double()
    ours = _Attention(theirs)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=1e-12)
    assert {f"{name}" for name in ours.state_dict()} == set(theirs.state_dict())
    dropped = ours.train()(x)
    assert not torch.allclose(dropped, theirs.eval()(x))


@pytest.mark.full
@pytest.mark.parametrize(("kind", "cached"), [("resnet", False), ("vit", True)])
def test_a_compiled_encoder_has_the_same_gradients(kind: str, cached: bool) -> None:
    if not shutil.which("g++"):
        pytest.skip("no g++ here: torch.compile makes C++ on the CPU")
    encoder, volume = make(kind).train(), volumes(4).float()
    if isinstance(encoder, ViT3D):
        encoder.blocks = encoder.blocks[:1]
    elif isinstance(encoder, ResNet3D):
        encoder.stages = encoder.stages[:1]
    compiled = copy.deepcopy(encoder)
    compiled.compute_with(ComputeSettings(compile=True, checkpointing=kind == "vit"), CPU)
    expected = gradients(encoder, volume, cached)
    torch._dynamo.utils.counters.clear()
    loss, found = gradients(compiled, volume, cached)
    # One graph and no breaks; with cached gradients another one without gradients.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 + cached
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-5)
    assert found.keys() == expected[1].keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-3, atol=1e-4)
    assert list(compiled.state_dict()) == list(encoder.state_dict())
