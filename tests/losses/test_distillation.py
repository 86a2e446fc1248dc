"""Distillation: NumPy oracle, identity, gradients, two ranks."""

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
from ctx_distill.losses.distillation import distillation_loss, mix_neighbours, relation_loss, scheduled

WEIGHTS = {"pair": 0.7, "relation": 1.3}


def unit(rows: int, dimension: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dimension, generator=draw, dtype=torch.float64), dim=-1)


def test_oracle() -> None:
    student, teacher, anchors, tau = 3 * unit(5, 4, 0), unit(5, 4, 1), unit(9, 4, 2), 0.2
    terms = distillation_loss(student, teacher, anchors, tau, WEIGHTS)
    h, u, a = (student / 3).numpy(), teacher.numpy(), anchors.numpy()
    pair = relation = entropy = 0.0
    for i in range(5):
        pair += (1 - h[i] @ u[i]) / 5
        p, q = np.exp(h[i] @ a.T / tau), np.exp(u[i] @ a.T / tau)
        p, q = p / p.sum(), q / q.sum()
        relation += sum(q[k] * np.log(q[k] / p[k]) for k in range(9)) / 5
        entropy -= sum(q[k] * np.log(q[k]) for k in range(9)) / 5
    assert terms["pair"].item() == pytest.approx(pair, abs=1e-12)
    assert terms["relation"].item() == pytest.approx(relation, abs=1e-12)
    assert terms["total"].item() == pytest.approx(0.7 * pair + 1.3 * relation, abs=1e-12)
    assert terms["target_entropy"].item() == pytest.approx(entropy, abs=1e-12)
    assert terms["target_entropy_share"].item() == pytest.approx(entropy / np.log(9), abs=1e-12)


def test_identity_a_student_like_its_teacher_pays_nothing() -> None:
    teacher = unit(5, 4, 1)
    student = (2 * teacher).requires_grad_()
    terms = distillation_loss(student, teacher, unit(9, 4, 2), 0.07, WEIGHTS)
    terms["total"].backward()
    for name in ("pair", "relation", "total"):
        assert terms[name].item() == pytest.approx(0, abs=1e-12)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-12


def test_gradients_reach_the_student_and_not_the_teacher() -> None:
    student, teacher, anchors = unit(4, 3, 0).requires_grad_(), unit(4, 3, 1).requires_grad_(), unit(6, 3, 2)
    assert torch.autograd.gradcheck(
        lambda s: distillation_loss(s, teacher.detach(), anchors, 0.3, WEIGHTS)["total"], (student,)
    )
    distillation_loss(student, teacher, anchors, 0.3, WEIGHTS)["total"].backward()
    assert teacher.grad is None


def test_near_uniform_targets_are_flagged() -> None:
    student, teacher, anchors = unit(4, 16, 0), unit(4, 16, 1), unit(30, 16, 2)
    assert relation_loss(student, teacher, anchors, 5.0)["target_near_uniform"] == 1
    assert relation_loss(student, teacher, anchors, 0.05)["target_near_uniform"] == 0


def test_neighbours_are_mixed_and_normalised() -> None:
    values = F.normalize(torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    weights = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.1, 0.2, 0.3, 0.4]])
    mixed = (values.numpy() * weights.numpy()[..., None]).sum(1)
    assert np.allclose(mix_neighbours(values, weights), mixed / np.linalg.norm(mixed, axis=1, keepdims=True), atol=1e-6)
    assert torch.allclose(mix_neighbours(values, weights)[0], values[0, 0], atol=1e-6)
    mean = values.mean(1)
    assert torch.allclose(mix_neighbours(values), mean / mean.norm(dim=1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("kind", ["batch", "bank", "prompts"])
def test_the_relation_over_each_kind_of_anchor(kind: str) -> None:
    """As many anchors as rows, the teacher among them; more anchors than rows; fewer."""
    teacher = unit(6, 5, 1)
    anchors = {"batch": F.normalize(teacher + 0.3 * unit(6, 5, 7), dim=-1), "bank": unit(40, 5, 2),
               "prompts": torch.cat([unit(2, 5, 3), -unit(2, 5, 3)])}[kind]  # fmt: skip
    student = unit(6, 5, 0).requires_grad_()
    terms = relation_loss(student, teacher, anchors, 0.1)
    p = np.exp(student.detach().numpy() @ anchors.numpy().T / 0.1)
    q = np.exp(teacher.numpy() @ anchors.numpy().T / 0.1)
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert terms["relation"].item() == pytest.approx((q * np.log(q / p)).sum(1).mean(), abs=1e-12)
    assert torch.autograd.gradcheck(lambda s: relation_loss(s, teacher, anchors, 0.1)["relation"], (student,))
    same = relation_loss(teacher.clone().requires_grad_(), teacher, anchors, 0.1)["relation"]
    assert same.item() == pytest.approx(0, abs=1e-12)


def test_two_teachers_make_one_target() -> None:
    retrieved, projected = unit(3, 4, 0), unit(3, 4, 1)
    weights = torch.tensor([[1.0, 0.5], [0.0, 0.5], [2.0, 0.0]])
    mixed = mix_neighbours(torch.stack([retrieved, projected], dim=1), weights).numpy()
    expected = weights.numpy()[:, :1] * retrieved.numpy() + weights.numpy()[:, 1:] * projected.numpy()
    np.testing.assert_allclose(mixed, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-12)
    np.testing.assert_allclose(mixed[1], projected[1], atol=1e-12)
    np.testing.assert_allclose(mixed[2], retrieved[2], atol=1e-12)


def test_schedules_end_where_they_should() -> None:
    assert [scheduled(0.4, 0.1, share, "geometric") for share in (0, 0.5, 1)] == pytest.approx([0.4, 0.2, 0.1])
    assert [scheduled(0.4, 0.1, share, "linear") for share in (0, 0.5, 1)] == pytest.approx([0.4, 0.25, 0.1])
    assert scheduled(0.4, None, 0.7, "geometric") == scheduled(0.4, None, 0.7, "linear") == 0.4


def test_refusals() -> None:
    student, teacher = unit(4, 3, 0), unit(4, 3, 1)
    assert "relation" not in distillation_loss(student, teacher, None, 0.1, {"pair": 1.0})
    assert distillation_loss(student, teacher, unit(5, 3, 2), 0.1, {"pair": 0.0})["total"] == 0
    with pytest.raises(ValueError, match="no anchors"):
        distillation_loss(student, teacher, None, 0.1, WEIGHTS)
    with pytest.raises(ValueError, match=r"anchors \(5, 2\)"):
        distillation_loss(student, teacher, unit(5, 2, 2), 0.1, WEIGHTS)
    with pytest.raises(ValueError, match="tau 0"):
        distillation_loss(student, teacher, unit(5, 3, 2), 0, WEIGHTS)
    with pytest.raises(ValueError, match="weights for relations"):
        distillation_loss(student, teacher, None, 0.1, {"relations": 1.0})
    with pytest.raises(ValueError, match=r"teacher \(4, 2\)"):
        distillation_loss(student, unit(4, 2, 1), None, 0.1, {"pair": 1.0})


def rank_of_step(x: Tensor, teacher: Tensor, anchors: Tensor, first: int) -> dict[str, Any]:
    mine = own_rows(len(x), first)
    head = nn.Linear(5, 4).double()
    with torch.no_grad():
        head.weight.copy_(unit(4, 5, 20))
        head.bias.copy_(unit(1, 4, 21)[0])
    model = nn.parallel.DistributedDataParallel(head) if distributed.world_size() > 1 else head
    gather = distributed.gather_with_gradient
    terms = distillation_loss(gather(model(x[mine])), gather(teacher[mine]), anchors, 0.2, WEIGHTS)
    terms["total"].backward()
    return {"terms": {n: v.detach() for n, v in terms.items()}, "grads": [p.grad for p in head.parameters()]}


@pytest.mark.ddp
@pytest.mark.parametrize("size", [2, 4])
def test_several_ranks_equal_one(pool: Callable[[int], Any], size: int) -> None:
    arguments = {"x": unit(7, 5, 0), "teacher": unit(7, 4, 1), "anchors": unit(9, 4, 2), "first": 5}
    expected = rank_of_step(**arguments)
    for result in pool(size).run(__file__, "rank_of_step", arguments):
        for name, value in expected["terms"].items():
            assert torch.allclose(result["terms"][name], value, atol=1e-12), name
        for value, gradient in zip(result["grads"], expected["grads"], strict=True):
            assert torch.allclose(value, gradient, atol=1e-12)


def rank_of_batch_anchors(x: Tensor, retrieved: Tensor, projected: Tensor, reports: Tensor, first: int) -> Tensor:
    """Gradient of a step whose anchors are the global batch's reports, of which a row without text is none."""
    mine = slice(0, first) if distributed.rank() == 0 else slice(first, None)
    if distributed.world_size() == 1:
        mine = slice(None)
    head = nn.Linear(5, 4).double()
    with torch.no_grad():
        head.weight.copy_(unit(4, 5, 20))
        head.bias.copy_(unit(1, 4, 21)[0])
    model = nn.parallel.DistributedDataParallel(head) if distributed.world_size() > 1 else head
    known = reports[mine].any(dim=1)
    weights = torch.stack([known.double(), torch.full_like(known, 0.5, dtype=torch.float64)], dim=1)
    target = mix_neighbours(torch.stack([retrieved[mine], projected[mine]], dim=1), weights)
    gather = distributed.gather_with_gradient
    anchors = gather(reports[mine])
    anchors = anchors[anchors.any(dim=1)]
    distillation_loss(gather(model(x[mine])), gather(target), anchors, 0.2, WEIGHTS)["total"].backward()
    assert head.weight.grad is not None
    return head.weight.grad


@pytest.mark.ddp
@pytest.mark.parametrize("first", [1, 6])
def test_two_ranks_of_unequal_rows_share_batch_anchors_and_a_mixed_target(
    pool: Callable[[int], Any], first: int
) -> None:
    reports = unit(7, 4, 3)
    reports[2] = 0
    arguments = {"x": unit(7, 5, 0), "retrieved": unit(7, 4, 1), "projected": unit(7, 4, 2), "reports": reports,
                 "first": first}  # fmt: skip
    expected = rank_of_batch_anchors(**arguments)
    for gradient in pool(2).run(__file__, "rank_of_batch_anchors", arguments):
        assert torch.allclose(gradient, expected, atol=1e-12)
