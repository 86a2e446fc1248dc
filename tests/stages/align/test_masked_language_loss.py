"""The loss of entity-focused masking: NumPy oracle, identity, gradients, two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ranks import own_rows
from torch import Tensor, nn

from ctx_distill import distributed
from ctx_distill.stages.align.masked_language_loss import masked_language_loss, masked_language_sums

TARGETS = torch.tensor([1, 2, 0, 3, 3, 1])
ENTITY = torch.tensor([1, 0, 0, 1, 1, 1]).bool()
OWNER = torch.tensor([0, 0, 0, 2, 2, 3])  # report 1 has no chosen token
ROWS = 4


def logits(seed: int = 0, rows: int = 6) -> Tensor:
    return torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_oracle() -> None:
    x = logits().numpy()
    terms = np.array([np.log(np.exp(x[i]).sum()) - x[i, t] for i, t in enumerate(TARGETS.tolist())])
    right = x.argmax(1) == TARGETS.numpy()
    sums, counts = masked_language_sums(logits(), TARGETS, ENTITY, OWNER, ROWS)
    np.testing.assert_allclose(sums, [terms[:3].sum(), 0, terms[3:5].sum(), terms[5]], atol=1e-12)
    assert counts[:, :2].tolist() == [[1, 2], [0, 0], [2, 0], [1, 0]]
    found = {name: value.item() for name, value in masked_language_loss(sums, counts).items()}
    entity = ENTITY.numpy()
    assert found == pytest.approx({
        "total": terms.mean(), "accuracy": right.mean(),
        "accuracy_entity": right[entity].mean(), "accuracy_other": right[~entity].mean(),
    }, abs=1e-12)  # fmt: skip


def test_identity_sure_and_right_costs_nothing() -> None:
    sure = 100.0 * nn.functional.one_hot(TARGETS, 4).double()
    found = masked_language_loss(*masked_language_sums(sure, TARGETS, ENTITY, OWNER, ROWS))
    assert found["total"].item() == pytest.approx(0, abs=1e-12)
    assert all(found[f"accuracy{kind}"] == 1 for kind in ("", "_entity", "_other"))


def test_nothing_chosen_costs_nothing_and_has_a_gradient() -> None:
    empty = logits()[:0].requires_grad_()
    none = torch.zeros(0).long()
    found = masked_language_loss(*masked_language_sums(empty, none, none.bool(), none, 2))
    found["total"].backward()
    assert found["total"] == 0
    assert found["accuracy"].isnan()
    assert empty.grad is not None


def test_gradients() -> None:
    def loss(x: Tensor) -> Tensor:
        return masked_language_loss(*masked_language_sums(x, TARGETS, ENTITY, OWNER, ROWS))["total"]

    assert torch.autograd.gradcheck(loss, (logits().requires_grad_(),))


def rank_of_step(x: Tensor, targets: Tensor, entity: Tensor, owner: Tensor, rows: int, first: int) -> dict[str, Any]:
    """One step of this rank's reports."""
    own = own_rows(rows, first)
    lower, upper = own.start, own.stop
    mine = (owner >= lower) & (owner < upper)
    head = nn.Linear(4, 4).double()
    with torch.no_grad():
        head.weight.copy_(logits(7)[:1].T @ logits(8)[:1])
        head.bias.zero_()
    model = nn.parallel.DistributedDataParallel(head) if distributed.world_size() > 1 else head
    sums, counts = masked_language_sums(model(x[mine]), targets[mine], entity[mine], owner[mine] - lower, upper - lower)
    found = masked_language_loss(sums, counts)
    found["total"].backward()
    return {"found": {k: v.detach() for k, v in found.items()}, "grads": [p.grad for p in head.parameters()]}


@pytest.mark.ddp
@pytest.mark.parametrize(("size", "first"), [(2, 1), (2, 2), (2, 3), (4, 2)])
def test_ranks_with_unequal_counts_equal_one(pool: Callable[[int], Any], size: int, first: int) -> None:
    arguments = {
        "x": logits(), "targets": TARGETS, "entity": ENTITY, "owner": OWNER, "rows": ROWS, "first": first,
    }  # fmt: skip
    expected = rank_of_step(**arguments)
    for result in pool(size).run(__file__, "rank_of_step", arguments):
        for name, value in expected["found"].items():
            assert torch.allclose(result["found"][name], value, atol=1e-12), name
        for value, gradient in zip(result["grads"], expected["grads"], strict=True):
            assert torch.allclose(value, gradient, atol=1e-12)


@pytest.mark.ddp
def test_a_rank_without_any_chosen_token(pool: Callable[[int], Any]) -> None:
    owner = torch.full_like(OWNER, 3)
    arguments = {"x": logits(), "targets": TARGETS, "entity": ENTITY, "owner": owner, "rows": ROWS, "first": 3}
    expected = rank_of_step(**arguments)
    for result in pool(2).run(__file__, "rank_of_step", arguments):
        assert torch.allclose(result["found"]["total"], expected["found"]["total"], atol=1e-12)
        assert torch.allclose(result["grads"][0], expected["grads"][0], atol=1e-12)
