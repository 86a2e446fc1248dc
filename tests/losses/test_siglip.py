"""SigLIP: NumPy oracle, identity, gradients, two ranks, and open_clip's loss beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ranks import own_rows
from torch import Tensor, nn
from torch.nn import functional as F

from ctx_distill import distributed
from ctx_distill.losses.siglip import INIT_LOGIT_BIAS, INIT_LOGIT_SCALE, siglip_loss

STUDY = torch.tensor([4, 7, 4, 9, 7, 4, 1])


def unit(rows: int, dimension: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dimension, generator=draw, dtype=torch.float64), dim=-1).to(dtype)


def test_oracle_a_pair_at_a_time() -> None:
    image, text = unit(7, 5, 0), unit(7, 5, 1)
    for study in (None, STUDY):
        total = 0.0
        for i in range(7):
            for j in range(7):
                sign = 1 if (i == j if study is None else study[i] == study[j]) else -1
                total += np.log1p(np.exp(-sign * (3.0 * float(image[i] @ text[j]) - 2.0)))
        result = siglip_loss(image, text, 3.0, -2.0, study)
        assert set(result) == {"total"}
        assert result["total"].item() == pytest.approx(total / 7, abs=1e-12)


def test_identity_pairs_told_apart_cost_nothing() -> None:
    basis = torch.eye(6, dtype=torch.float64)
    assert siglip_loss(basis, basis, 100.0, -50.0)["total"].item() == pytest.approx(0, abs=1e-12)
    # Logits of 0 are a coin toss for each of a row's 6 pairs.
    assert siglip_loss(basis, basis, 0.0, 0.0)["total"].item() == pytest.approx(6 * np.log(2))
    unique = siglip_loss(unit(6, 4, 0), unit(6, 4, 1), 5.0, -3.0, torch.arange(6))
    assert torch.equal(unique["total"], siglip_loss(unit(6, 4, 0), unit(6, 4, 1), 5.0, -3.0)["total"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_agrees_with_open_clip(dtype: torch.dtype) -> None:
    from open_clip.loss import SigLipLoss

    results = []
    for own in (True, False):
        image, text = unit(16, 8, 0, dtype).requires_grad_(), unit(16, 8, 1, dtype).requires_grad_()
        scale = torch.tensor(INIT_LOGIT_SCALE, dtype=dtype, requires_grad=True)
        bias = torch.tensor(INIT_LOGIT_BIAS, dtype=dtype, requires_grad=True)
        loss = (
            siglip_loss(image, text, scale, bias, torch.arange(16))["total"]
            if own
            else SigLipLoss()(image, text, scale, bias)
        )
        loss.backward()
        results.append((loss.detach(), image.grad, text.grad, scale.grad, bias.grad))
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("study", [None, STUDY])
def test_gradients_and_chunks(study: Tensor | None) -> None:
    inputs = (
        unit(7, 3, 0).requires_grad_(),
        unit(7, 3, 1).requires_grad_(),
        torch.tensor(4.0, dtype=torch.float64, requires_grad=True),
        torch.tensor(-2.0, dtype=torch.float64, requires_grad=True),
    )
    whole = siglip_loss(*inputs, study)["total"]
    for chunk in (None, 1, 3, 100):
        assert torch.autograd.gradcheck(lambda *x, chunk=chunk: siglip_loss(*x, study, chunk)["total"], inputs)
        assert torch.allclose(siglip_loss(*inputs, study, chunk)["total"], whole, atol=1e-12)


def test_chunks_keep_no_logits() -> None:
    image, text = unit(64, 4, 0).requires_grad_(), unit(64, 4, 1).requires_grad_()
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        siglip_loss(image, text, 4.0, -4.0, chunk=8)["total"].backward()
    assert max(sizes) <= 64 * 4


def test_half_features_are_compared_in_float32() -> None:
    image, text = unit(7, 5, 0, torch.bfloat16), unit(7, 5, 1, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        result = siglip_loss(image, text, 100.0, -10.0)["total"]
    assert result.dtype == torch.float32
    assert torch.allclose(result, siglip_loss(image.float(), text.float(), 100.0, -10.0)["total"])


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(4, 2\)"):
        siglip_loss(torch.ones(3, 2), torch.ones(4, 2), 1.0, 0.0)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Parameter(unit(5, 4, 10)), nn.Parameter(unit(5, 4, 11))
        self.log_scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image, text = F.normalize(image @ self.image, dim=-1), F.normalize(text @ self.text, dim=-1)
        return image, text, self.log_scale.exp(), self.bias * 1


def rank_of_step(image: Tensor, text: Tensor, study: Tensor, first: int, chunk: int | None) -> dict[str, Any]:
    mine = own_rows(len(image), first)
    towers = Towers()
    model = nn.parallel.DistributedDataParallel(towers) if distributed.world_size() > 1 else towers
    image_features, text_features, scale, bias = model(image[mine], text[mine])
    gather = distributed.gather_with_gradient
    total = siglip_loss(
        gather(image_features), gather(text_features), scale, bias, gather(study[mine]), chunk
    )["total"]  # fmt: skip
    total.backward()
    return {"total": total.detach(), "grads": [p.grad for p in towers.parameters()]}


@pytest.mark.ddp
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("first", "chunk"), [(4, None), (5, 3)])
def test_several_ranks_equal_one(pool: Callable[[int], Any], size: int, first: int, chunk: int | None) -> None:
    arguments = {"image": unit(7, 5, 0), "text": unit(7, 5, 1), "study": STUDY, "first": first, "chunk": chunk}
    expected = rank_of_step(**arguments)
    for result in pool(size).run(__file__, "rank_of_step", arguments):
        assert torch.allclose(result["total"], expected["total"], atol=1e-12)
        for value, gradient in zip(result["grads"], expected["grads"], strict=True):
            assert torch.allclose(value, gradient, atol=1e-12)
