"""Losses of the findings head against torchvision and NumPy; mixup by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from ctx_distill.errors import InputError
from ctx_distill.stages.classifier.loss import LossSettings, findings_terms, mixup

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 3
TARGETS = (torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) > 0.6).float()


@pytest.mark.parametrize(("alpha", "theirs"), [(None, -1.0), (0.25, 0.25), (0.9, 0.9)])
@pytest.mark.parametrize("gamma", [0.0, 2.0, 3.5])
def test_focal_is_torchvisions(alpha: float | None, theirs: float, gamma: float) -> None:
    own = findings_terms(LOGITS, TARGETS, LossSettings("focal", gamma, alpha), torch.full((4,), 7.0))
    torch.testing.assert_close(own, sigmoid_focal_loss(LOGITS, TARGETS, alpha=theirs, gamma=gamma))


@pytest.mark.parametrize("kind", ["weighted", "plain"])
def test_cross_entropy_in_numpy(kind: str) -> None:
    weight = np.array([1.0, 2.0, 5.0, 10.0])
    p, y = 1 / (1 + np.exp(-LOGITS.double().numpy())), TARGETS.numpy()
    positive = weight if kind == "weighted" else 1.0
    expected = -(positive * y * np.log(p) + (1 - y) * np.log(1 - p))
    own = findings_terms(LOGITS, TARGETS, LossSettings(kind), torch.from_numpy(weight).float())  # type: ignore[arg-type]
    np.testing.assert_allclose(own.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_mixup_by_hand() -> None:
    volume = torch.tensor([[0.0], [10.0], [100.0]])
    labels = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 1.0], [1.0, torch.nan, 1.0]])
    mixed, targets = mixup(volume, labels, 0.4, [5, 6, 7])
    # row 0 is w * 0 + (1 - w) * 10, and so on round
    w = [1 - mixed[0, 0] / 10, (100 - mixed[1, 0]) / 90, mixed[2, 0] / 100]
    assert all(0 <= x <= 1 for x in w)
    nan = float("nan")
    expected = [[w[0], 0, nan], [1 - w[1], nan, 1], [1, nan, nan]]
    torch.testing.assert_close(targets, torch.tensor(expected), equal_nan=True)
    again, _ = mixup(volume[[0, 1]], labels[[0, 1]], 0.4, [5, 6])
    assert again[0] == mixed[0]  # of the row's own seed


def test_mixups_weights_are_beta() -> None:
    weights = 1 - mixup(torch.tensor([[0.0], [1.0]]).repeat(2000, 1), torch.zeros(4000, 1), 0.4, list(range(4000)))[0]
    drawn = weights[::2, 0].numpy()
    assert drawn.mean() == pytest.approx(0.5, abs=0.03)
    assert drawn.var() == pytest.approx(0.25 / (2 * 0.4 + 1), abs=0.01)  # ab / ((a+b)^2 (a+b+1))


@pytest.mark.parametrize("wrong", [{"gamma": -1.0}, {"alpha": 2.0}, {"mixup": -0.1}])
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected gamma"):
        LossSettings(**wrong)  # type: ignore[arg-type]
