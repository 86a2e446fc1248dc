"""Chunked cross-entropy: NumPy oracle, identity, gradients, and the sizes that it holds (two ranks: `test_contrastive`)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ctx_distill.losses.chunked import chunked_cross_entropy


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def everything(start: int, stop: int) -> None:
    del start, stop


@pytest.mark.parametrize("chunk", [1, 3, 7, 9])
def test_oracle_of_soft_targets_and_left_out_pairs(chunk: int) -> None:
    """Rows of T need not sum to 1."""
    q, k, scale = drawn(7, 4), drawn(7, 4, seed=1), 2.5
    targets = (drawn(7, 7, seed=2).abs() * (drawn(7, 7, seed=3) > 0)).fill_diagonal_(0.7)
    kept = (drawn(7, 7, seed=4) > -0.3) | (targets > 0)
    assert not kept.all()
    logits = scale * q.numpy() @ k.numpy().T
    expected = 0.0
    for i in range(7):
        denominator = np.exp(logits[i][kept[i].numpy()]).sum()
        expected -= sum(float(targets[i, j]) * np.log(np.exp(logits[i, j]) / denominator) for j in range(7)) / 7
    loss = chunked_cross_entropy(q, k, torch.tensor(scale).double(), lambda a, b: targets[a:b], lambda a, b: kept[a:b],
                                 chunk)  # fmt: skip
    assert loss.item() == pytest.approx(expected, abs=1e-12)

    inputs = (q.requires_grad_(), k.requires_grad_(), torch.tensor(scale, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(
        lambda *x: chunked_cross_entropy(*x, lambda a, b: targets[a:b], lambda a, b: kept[a:b], chunk), inputs
    )


def test_identity_is_torch_s_cross_entropy_with_its_gradients() -> None:
    results = []
    for own in (True, False):
        q, k = drawn(11, 5).requires_grad_(), drawn(11, 5, seed=1).requires_grad_()
        scale = torch.tensor(80.0, dtype=torch.float64, requires_grad=True)
        loss = (
            chunked_cross_entropy(q, k, scale, everything, everything, 4)
            if own
            else torch.nn.functional.cross_entropy(scale * q @ k.T, torch.arange(11))
        )
        (3 * loss).backward()
        results.append([loss.detach(), q.grad, k.grad, scale.grad])
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        loss = chunked_cross_entropy(q, k, scale, everything, everything, 4)
    assert loss == results[0][0]


def test_one_chunk_of_logits_serves_all() -> None:
    """What is allocated of a chunk's size or more does not grow with the number of chunks."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.blocks: set[int] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.numel() >= 8 * 64:
                self.blocks.add(result.untyped_storage().data_ptr())
            return result

    q, k = drawn(64, 3).requires_grad_(), drawn(64, 3, seed=1).requires_grad_()
    with Largest() as seen:
        chunked_cross_entropy(q, k, torch.tensor(4.0).double(), everything, everything, 8).backward()
    assert len(seen.blocks) == 1
