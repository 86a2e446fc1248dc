"""Soft targets: NumPy oracle, identity, gradients, and two ranks."""

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
from ctx_distill.losses.contrastive import contrastive_loss
from ctx_distill.losses.soft_targets import soft_target_loss, soft_targets

STUDY = torch.tensor([4, 7, 4, 9, 7, 4, 1])


def unit(rows: int, dimension: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dimension, generator=draw, dtype=torch.float64), dim=-1)


def test_oracle_a_pair_at_a_time() -> None:
    image, text, reports = unit(7, 5, 0), unit(7, 5, 1), 3 * unit(7, 4, 2)
    targets, logits = np.zeros((7, 7)), 3.0 * (image @ text.T).numpy()
    for i in range(7):
        similar = [np.exp(float(reports[i] @ reports[j]) / 9 / 0.2) for j in range(7)]
        same = [float(STUDY[i] == STUDY[j]) for j in range(7)]
        for j in range(7):
            targets[i, j] = 0.7 * same[j] / sum(same) + 0.3 * similar[j] / sum(similar)
    np.testing.assert_allclose(soft_targets(reports, STUDY, 0.3, 0.2), targets, atol=1e-12)
    result = soft_target_loss(image, text, 3.0, reports, STUDY, 0.3, 0.2)
    for name, table in (("image_to_text", logits), ("text_to_image", logits.T)):
        log_p = table - np.log(np.exp(table).sum(1, keepdims=True))
        assert result[name].item() == pytest.approx(-(targets * log_p).sum() / 7, abs=1e-12)
    assert result["total"].item() == pytest.approx((result["image_to_text"] + result["text_to_image"]).item() / 2)


def test_identity_without_weight_it_is_infonce() -> None:
    image, text, reports = unit(7, 5, 0), unit(7, 5, 1), unit(7, 4, 2)
    plain = contrastive_loss(image, text, 3.0, study=STUDY)
    for name, value in soft_target_loss(image, text, 3.0, reports, STUDY, 0.0, 0.2).items():
        assert torch.allclose(value, plain[name], atol=1e-12)
    # Where all reports are alike and all is given away, every pair has the same target.
    assert torch.allclose(soft_targets(reports[:1].expand(7, 4), STUDY, 1.0, 0.2), torch.full((7, 7), 1 / 7).double())


def test_gradients_reach_features_and_scale_and_never_the_reports() -> None:
    inputs = (unit(7, 3, 0).requires_grad_(), unit(7, 3, 1).requires_grad_())
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    reports = unit(7, 4, 2).requires_grad_()
    for chunk in (None, 3):

        def loss(image: Tensor, text: Tensor, scale: Tensor, chunk: int | None = chunk) -> Tensor:
            return soft_target_loss(image, text, scale, reports, STUDY, 0.3, 0.2, chunk)["total"]

        assert torch.autograd.gradcheck(loss, (*inputs, scale))
    loss(*inputs, scale).backward()
    assert reports.grad is None


@pytest.mark.parametrize(("weight", "temperature"), [(-0.1, 0.2), (1.1, 0.2), (0.2, 0.0)])
def test_settings_out_of_range_are_refused(weight: float, temperature: float) -> None:
    with pytest.raises(ValueError, match="expected a weight from 0 to 1 and a positive temperature"):
        soft_targets(unit(3, 4, 0), torch.arange(3), weight, temperature)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Parameter(unit(5, 4, 10)), nn.Parameter(unit(5, 4, 11))
        self.log_scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text = F.normalize(image @ self.image, dim=-1), F.normalize(text @ self.text, dim=-1)
        return image, text, self.log_scale.exp()


def rank_of_step(image: Tensor, text: Tensor, reports: Tensor, study: Tensor, first: int) -> dict[str, Any]:
    mine = own_rows(len(image), first)
    towers = Towers()
    model = nn.parallel.DistributedDataParallel(towers) if distributed.world_size() > 1 else towers
    image_features, text_features, scale = model(image[mine], text[mine])
    gather = distributed.gather_with_gradient
    total = soft_target_loss(
        gather(image_features), gather(text_features), scale, gather(reports[mine]), gather(study[mine]), 0.3, 0.2
    )["total"]
    total.backward()
    return {"total": total.detach(), "grads": [p.grad for p in towers.parameters()]}


@pytest.mark.ddp
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("first", [4, 5])
def test_several_ranks_equal_one(pool: Callable[[int], Any], size: int, first: int) -> None:
    arguments = {"image": unit(7, 5, 0), "text": unit(7, 5, 1), "reports": unit(7, 4, 2)}
    arguments |= {"study": STUDY, "first": first}  # type: ignore[dict-item]
    expected = rank_of_step(**arguments)  # type: ignore[arg-type]
    for result in pool(size).run(__file__, "rank_of_step", arguments):
        assert torch.allclose(result["total"], expected["total"], atol=1e-12)
        for value, gradient in zip(result["grads"], expected["grads"], strict=True):
            assert torch.allclose(value, gradient, atol=1e-12)
