"""InfoNCE: NumPy oracle, identity, gradients, two ranks, and open_clip's loss beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ranks import own_rows
from torch import Tensor, nn
from torch.nn import functional as F

from ctx_distill import distributed
from ctx_distill.losses.contrastive import contrastive_loss, study_targets

STUDY = torch.tensor([4, 7, 4, 9, 7, 4, 1])


def unit(rows: int, dimension: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dimension, generator=draw, dtype=torch.float64), dim=-1).to(dtype)


def oracle(
    image: Tensor, text: Tensor, scale: float, targets: NDArray[Any], text_targets: NDArray[Any], keep: NDArray[Any]
) -> tuple[float, float]:
    """The formulas of the module's docstring, a pair at a time."""
    logits = scale * image.numpy() @ text.numpy().T

    def direction(logits: NDArray[Any], targets: NDArray[Any], keep: NDArray[Any]) -> float:
        total = 0.0
        for i in range(len(logits)):
            denominator = sum(np.exp(logits[i, j]) for j in range(len(logits)) if keep[i, j])
            total -= sum(
                targets[i, j] * np.log(np.exp(logits[i, j]) / denominator) for j in range(len(logits)) if targets[i, j]
            )
        return total / len(logits)

    return direction(logits, targets, keep), direction(logits.T, text_targets, keep.T)


def test_oracle_of_studies_soft_targets_and_denominator() -> None:
    image, text = unit(7, 5, 0), unit(7, 5, 1)
    same = study_targets(STUDY, torch.float64)
    everything = np.ones((7, 7), bool)
    result = contrastive_loss(image, text, 3.0, study=STUDY)
    expected = oracle(image, text, 3.0, same.numpy(), same.numpy(), everything)
    assert (result["image_to_text"].item(), result["text_to_image"].item()) == pytest.approx(expected, abs=1e-12)
    assert result["total"].item() == pytest.approx(sum(expected) / 2, abs=1e-12)

    draw = torch.Generator().manual_seed(3)
    soft = torch.rand(7, 7, generator=draw, dtype=torch.float64) * (torch.rand(7, 7, generator=draw) > 0.5)
    soft = soft + torch.eye(7, dtype=torch.float64)
    keep = (torch.rand(7, 7, generator=draw) > 0.4) | (soft > 0)
    rows, columns = soft / soft.sum(1, keepdim=True), soft.T / soft.T.sum(1, keepdim=True)
    result = contrastive_loss(image, text, 3.0, targets=rows, text_targets=columns, denominator=keep)
    expected = oracle(image, text, 3.0, rows.numpy(), columns.numpy(), keep.numpy())
    assert (result["image_to_text"].item(), result["text_to_image"].item()) == pytest.approx(expected, abs=1e-12)

    back = rows.T / rows.T.sum(1, keepdim=True)
    result = contrastive_loss(image, text, 3.0, targets=rows)
    assert result["text_to_image"].item() == pytest.approx(
        oracle(image, text, 3.0, rows.numpy(), back.numpy(), everything)[1], abs=1e-12
    )


def test_identity_aligned_pairs_cost_nothing() -> None:
    basis = torch.eye(6, dtype=torch.float64)
    assert contrastive_loss(basis, basis, 60.0)["total"].item() == pytest.approx(0, abs=1e-12)
    # Nothing told apart: the loss is the logarithm of the number of candidates.
    alike = torch.ones(6, 1, dtype=torch.float64)
    assert contrastive_loss(alike, alike, 60.0)["total"].item() == pytest.approx(np.log(6))
    unique = contrastive_loss(unit(6, 4, 0), unit(6, 4, 1), 5.0, study=torch.arange(6))
    assert torch.allclose(unique["total"], contrastive_loss(unit(6, 4, 0), unit(6, 4, 1), 5.0)["total"])


@pytest.mark.parametrize(("dtype", "scale", "atol"), [(torch.float64, 100.0, 1e-12), (torch.float32, 14.3, 1e-6)])
def test_agrees_with_open_clip(dtype: torch.dtype, scale: float, atol: float) -> None:
    from open_clip.loss import ClipLoss

    results = []
    for own in (True, False):
        image, text = unit(16, 8, 0, dtype).requires_grad_(), unit(16, 8, 1, dtype).requires_grad_()
        temperature = torch.tensor(scale, dtype=dtype, requires_grad=True)
        loss = (
            contrastive_loss(image, text, temperature, study=torch.arange(16))["total"]
            if own
            else ClipLoss()(image, text, temperature)
        )
        loss.backward()
        results.append((loss.detach(), image.grad, text.grad, temperature.grad))
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("form", ["plain", "study", "corrected"])
def test_gradients(form: str) -> None:
    image, text = unit(7, 3, 0).requires_grad_(), unit(7, 3, 1).requires_grad_()
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    keep = torch.ones(7, 7, dtype=torch.bool)
    keep[0, 3] = keep[5, 6] = False
    options: dict[str, Any] = {
        "plain": {},
        "study": {"study": STUDY},
        "corrected": {"targets": study_targets(STUDY, torch.float64), "denominator": keep},
    }[form]
    assert torch.autograd.gradcheck(lambda *x: contrastive_loss(*x, **options)["total"], (image, text, scale))
    assert torch.autograd.gradcheck(lambda *x: contrastive_loss(*x, **options, chunk=3)["total"], (image, text, scale))


def test_chunks_do_not_change_the_loss_or_the_gradient() -> None:
    keep = torch.ones(7, 7, dtype=torch.bool)
    keep[2, 3] = False
    for options in ({}, {"study": STUDY}, {"targets": study_targets(STUDY), "denominator": keep}):
        results = []
        for chunk in (None, 1, 3, 7, 100):
            image, text = unit(7, 3, 0).requires_grad_(), unit(7, 3, 1).requires_grad_()
            loss = contrastive_loss(image, text, 4.0, chunk=chunk, **options)["total"]  # type: ignore[arg-type]
            loss.backward()
            results.append((loss.detach(), image.grad, text.grad))
        for result in results[1:]:
            for value, expected in zip(result, results[0], strict=True):
                assert torch.allclose(value, expected, atol=1e-12)


def test_chunks_keep_no_logits() -> None:
    """Autograd saves nothing of (chunk, B) or (B, B)."""
    image, text = unit(64, 4, 0).requires_grad_(), unit(64, 4, 1).requires_grad_()
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        contrastive_loss(image, text, 4.0, study=torch.arange(64), chunk=8)["total"].backward()
    assert max(sizes) <= 64 * 4


def test_half_features_are_compared_in_float32() -> None:
    image, text = unit(7, 5, 0, torch.bfloat16), unit(7, 5, 1, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        result = contrastive_loss(image, text, 100.0)["total"]
    assert result.dtype == torch.float32
    assert torch.allclose(result, contrastive_loss(image.float(), text.float(), 100.0)["total"])


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(4, 2\)"):
        contrastive_loss(torch.ones(3, 2), torch.ones(4, 2), 1.0)
    with pytest.raises(ValueError, match=r"targets \(2, 2\); expected \(3, 3\)"):
        contrastive_loss(torch.ones(3, 2), torch.ones(3, 2), 1.0, targets=torch.ones(2, 2))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Parameter(unit(5, 4, 10))
        self.text = nn.Parameter(unit(5, 4, 11))
        self.log_scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text = F.normalize(image @ self.image, dim=-1), F.normalize(text @ self.text, dim=-1)
        return image, text, self.log_scale.exp()


def rank_of_step(image: Tensor, text: Tensor, study: Tensor, first: int, chunk: int | None) -> dict[str, Any]:
    mine = own_rows(len(image), first)
    towers = Towers()
    model = nn.parallel.DistributedDataParallel(towers) if distributed.world_size() > 1 else towers
    image_features, text_features, scale = model(image[mine], text[mine])
    gather = distributed.gather_with_gradient
    terms = contrastive_loss(
        gather(image_features), gather(text_features), scale, study=gather(study[mine]), chunk=chunk
    )
    terms["total"].backward()
    return {"total": terms["total"].detach(), "grads": [p.grad for p in towers.parameters()]}


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


def rank_beside_open_clip(image: Tensor, text: Tensor, scale: Tensor, local_loss: bool | None) -> dict[str, Any]:
    """Loss and gradients of this rank's half: by open_clip's loss, or by ours where `local_loss` is None."""
    from open_clip.loss import ClipLoss

    rank, world = distributed.rank(), distributed.world_size()
    mine = slice(rank * len(image) // world, (rank + 1) * len(image) // world)
    image, text, scale = (x.clone().requires_grad_() for x in (image[mine], text[mine], scale))
    if local_loss is None:
        gather = distributed.gather_with_gradient
        loss = contrastive_loss(gather(image), gather(text), scale)["total"]
    else:
        theirs = ClipLoss(local_loss=local_loss, gather_with_grad=True, rank=rank, world_size=world)
        loss = theirs(image, text, scale)
    loss.backward()
    return {"loss": loss.detach(), "image": image.grad, "text": text.grad, "scale": scale.grad}


@pytest.mark.ddp
@pytest.mark.parametrize("local_loss", [False, True])
@pytest.mark.parametrize(("dtype", "scale", "atol"), [(torch.float64, 100.0, 1e-12), (torch.float32, 14.3, 1e-6)])
def test_agrees_with_open_clip_on_two_ranks(
    pool: Callable[[int], Any], local_loss: bool, dtype: torch.dtype, scale: float, atol: float
) -> None:
    """Forward and gradient, of both of open_clip's ways to gather.

    With L the loss of the global batch, each of ours is L, and backward gives a rank's features the sum over ranks,
    2 dL/dx, of which DDP's mean makes dL/dtheta. open_clip's all_gather sums over ranks as well: without `local_loss`
    each rank has L, so the same 2 dL/dx; with it, ranks have halves of L's rows, L_0 + L_1 = 2 L, so the same again.
    The temperature stands behind the gather: ranks' gradients differ with `local_loss`, their mean does not.
    """
    arguments = {"image": unit(16, 8, 0, dtype), "text": unit(16, 8, 1, dtype), "scale": torch.tensor(scale).to(dtype)}
    mine = pool(2).run(__file__, "rank_beside_open_clip", {**arguments, "local_loss": None})
    theirs = pool(2).run(__file__, "rank_beside_open_clip", {**arguments, "local_loss": local_loss})
    whole = rank_beside_open_clip(**arguments, local_loss=False)
    for name in ("image", "text"):
        for own, other in zip(mine, theirs, strict=True):
            assert torch.allclose(own[name], other[name], rtol=0, atol=atol)
        assert torch.allclose(torch.cat([own[name] for own in mine]) / 2, whole[name], rtol=0, atol=atol)
    for name in ("loss", "scale"):
        mean = (theirs[0][name] + theirs[1][name]) / 2
        for value in (*(own[name] for own in mine), whole[name]):
            assert torch.allclose(value, mean, rtol=0, atol=atol)
