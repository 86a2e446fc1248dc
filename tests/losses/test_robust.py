"""False negatives: evidence, identification, correction, and the corrected loss on one and two ranks."""

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
from ctx_distill.losses import robust
from ctx_distill.losses.contrastive import contrastive_loss, study_targets
from ctx_distill.types import InputError

NAN = float("nan")
STUDY = torch.tensor([0, 1, 2, 2, 3, 4, 5, 6])


def unit(rows: int, dimension: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dimension, generator=draw, dtype=torch.float64), dim=-1)


def scores(seed: int) -> Tensor:
    return torch.rand(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def base() -> Tensor:
    return study_targets(STUDY, torch.float64)


def test_cosine_evidence_against_numpy() -> None:
    a, b = 3 * unit(5, 4, 0), unit(5, 4, 1)
    plain = (a.numpy() / 3) @ (a.numpy() / 3).T
    assert np.allclose(robust.report_evidence(a), plain)
    assert np.allclose(robust.retrieved_evidence(a), plain)
    assert np.allclose(robust.ema_evidence(a, b), (a.numpy() / 3) @ b.numpy().T)
    assert not robust.ema_evidence(a.requires_grad_(), b).requires_grad


def test_findings_agree_when_both_are_normal_or_show_the_same() -> None:
    findings = torch.tensor([[0, NAN, 0], [NAN, NAN, NAN], [1, 0, 0], [1, NAN, NAN], [1, -1, 0], [1, 1, 0]])
    expected = np.eye(6)
    for i, j in ((0, 1), (2, 3)):
        expected[i, j] = expected[j, i] = 1
    assert np.array_equal(robust.findings_evidence(findings), expected)
    known = torch.tensor([True, False, True, True, True, True])
    assert robust.findings_evidence(findings, known)[0, 1] == 0


def test_identification_joins_evidence_on_one_scale() -> None:
    evidence = {"report": torch.tensor([[1.0, 0.95], [0.8, 1.0]]), "findings": torch.tensor([[1.0, 0.0], [1.0, 1.0]])}
    thresholds = {"report": 0.9, "findings": 0.5}
    found, strength = robust.identify(evidence, thresholds)
    assert found.tolist() == [[True, True], [True, True]]
    assert torch.allclose(strength, torch.tensor([[1.0, 0.5], [1.0, 1.0]]))
    found, strength = robust.identify(evidence, thresholds, combine="all")
    assert found.tolist() == [[True, False], [False, True]]
    assert strength[0, 1] == strength[1, 0] == 0
    found, _ = robust.identify(evidence, {"report": 0.9})
    assert found.tolist() == [[True, True], [False, True]]
    with pytest.raises(ValueError, match="no evidence for ema"):
        robust.identify(evidence, {"ema": 0.5})
    with pytest.raises(ValueError, match="no thresholds"):
        robust.identify(evidence, {})


def test_evidence_without_a_margin_has_full_strength_and_without_a_threshold_none() -> None:
    agree = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    found, strength = robust.identify({"findings": agree}, {"findings": 1.0})
    assert torch.equal(found, agree.bool())
    assert torch.equal(strength, agree)
    cosine = torch.tensor([[1.0, 0.9], [0.2, 1.0]])
    evidence, thresholds = {"report": cosine, "ema": cosine}, {"report": 0.8, "ema": float("inf")}
    found, strength = robust.identify(evidence, thresholds)
    assert torch.equal(found, cosine >= 0.8)
    assert torch.allclose(strength, torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    found, strength = robust.identify(evidence, thresholds, combine="all")
    assert not found.any()
    assert not strength.any()


def test_corrections_against_numpy() -> None:
    found = torch.zeros(8, 8, dtype=torch.bool)
    found[0, 1] = found[1, 0] = found[4, 6] = True
    found[2, 3] = found[5, 5] = True  # one study, and the diagonal: true positives
    strength = scores(0)
    chosen = [(0, 1), (1, 0), (4, 6)]
    weights = {"relabel": dict.fromkeys(chosen, 0.25), "soft": {ij: strength[ij].item() for ij in chosen}, "mask": {}}
    for mode, added in weights.items():
        result = robust.correct(base(), found, strength, mode, weight=0.25)  # type: ignore[arg-type]
        expected = (STUDY[:, None] == STUDY[None]).double().numpy()
        keep = np.ones((8, 8), bool)
        for ij in chosen:
            expected[ij] = added.get(ij, 0)
            keep[ij] = mode != "mask"
        assert np.allclose(result.targets, expected / expected.sum(1, keepdims=True)), mode
        assert np.allclose(result.text_targets, expected.T / expected.T.sum(1, keepdims=True)), mode
        assert np.array_equal(result.denominator, keep), mode
        assert (result.suspected, result.corrected) == (3, 3)
    with pytest.raises(ValueError, match="'drop'"):
        robust.correct(base(), found, strength, "drop")  # type: ignore[arg-type]


def test_identity_no_suspects_and_the_warm_up_change_nothing() -> None:
    none = robust.correct(base(), torch.zeros(8, 8, dtype=torch.bool), scores(0), "relabel")
    watching = robust.correct(base(), torch.ones(8, 8, dtype=torch.bool), scores(0), "mask", watch=True)
    for result in (none, watching):
        assert torch.allclose(result.targets, base())
        assert torch.allclose(result.text_targets, base())
        assert result.denominator.all()
        assert result.corrected == 0
    assert (none.suspected, watching.suspected) == (0, 64 - 10)


def test_at_most_half_of_a_row_and_column_the_strongest_first() -> None:
    strength = scores(3)
    result = robust.correct(base(), torch.ones(8, 8, dtype=torch.bool), strength, "mask")
    gone = ~result.denominator
    assert not gone[base() > 0].any()
    negatives = (base() == 0).sum(1)
    assert (gone.sum(1) <= negatives // 2).all()
    assert (gone.sum(0) <= negatives // 2).all()
    assert gone.sum() == result.corrected > 10
    for i in range(8):  # every pair corrected is among the strongest half of its row and of its column
        limit = int(negatives[i]) // 2
        row = [j for j in strength[i].argsort(descending=True).tolist() if base()[i, j] == 0][:limit]
        column = [j for j in strength[:, i].argsort(descending=True).tolist() if base()[i, j] == 0][:limit]
        assert set(gone[i].nonzero()[:, 0].tolist()) <= set(row)
        assert set(gone[:, i].nonzero()[:, 0].tolist()) <= set(column)
    one_row = torch.zeros(8, 8, dtype=torch.bool)
    one_row[0] = True
    assert robust.correct(base(), one_row, strength, "mask").corrected == 3
    tied = robust.correct(base(), torch.ones(8, 8, dtype=torch.bool), torch.ones(8, 8), "mask")
    assert ((~tied.denominator).sum(1) <= negatives // 2).all()


def test_a_corrected_pair_is_no_longer_pushed_apart() -> None:
    image, text = unit(8, 6, 0), unit(8, 6, 1)
    found = torch.zeros(8, 8, dtype=torch.bool)
    found[0, 1] = True

    def pull(mode: str | None) -> float:
        """How the loss grows as image 0 moves towards text 1: positive pushes them apart."""
        moving = image.clone().requires_grad_()
        corrected = None if mode is None else robust.correct(base(), found, scores(0), mode, weight=1.0)  # type: ignore[arg-type]
        loss = (
            contrastive_loss(moving, text, 1.0, study=STUDY)
            if corrected is None
            else contrastive_loss(
                moving,
                text,
                1.0,
                targets=corrected.targets,
                text_targets=corrected.text_targets,
                denominator=corrected.denominator,
            )
        )
        loss["total"].backward()
        assert moving.grad is not None
        return float(moving.grad[0] @ text[1])

    assert pull("relabel") < pull("mask") < pull(None)


def test_gradients_through_each_correction() -> None:
    image, text = unit(8, 3, 0).requires_grad_(), unit(8, 3, 1).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    for mode in ("relabel", "mask", "soft"):
        fix = robust.correct(base(), scores(1) > 0.6, scores(2), mode)

        def loss(image: Tensor, text: Tensor, scale: Tensor, fix: robust.Correction = fix) -> Tensor:
            return contrastive_loss(
                image, text, scale, targets=fix.targets, text_targets=fix.text_targets, denominator=fix.denominator
            )["total"]

        assert torch.autograd.gradcheck(loss, (image, text, scale)), mode


def test_threshold_from_training_pairs() -> None:
    values = torch.linspace(0, 1, 101)
    assert robust.threshold_from_quantile(values.reshape(1, -1), 0.9) == pytest.approx(0.9)
    for bad in (0, 1, 1.5, NAN):
        with pytest.raises(InputError, match="quantile"):
            robust.threshold_from_quantile(values, bad)
    with pytest.raises(InputError, match="no training pairs"):
        robust.threshold_from_quantile(torch.zeros(0), 0.9)
    rows = unit(4, 3, 0).float()
    study = torch.tensor([0, 0, 1, 1])
    drawn = robust.sample_similarities(rows, study=study, pairs=2000, seed=1)
    allowed = (rows @ rows.T)[study[:, None] != study[None]]
    distance = (drawn[:, None] - allowed[None]).abs()
    assert distance.amin(dim=1).max() < 1e-6  # only pairs of different studies,
    assert distance.amin(dim=0).max() < 1e-6  # and all of them
    assert 800 < len(drawn) < 1200
    assert torch.equal(drawn, robust.sample_similarities(rows, study=study, pairs=2000, seed=1))


def test_quality_of_the_identification() -> None:
    labels = torch.tensor([[1, 0], [1, NAN], [0, 0], [NAN, -1], [1, 0]])
    found = torch.zeros(5, 5, dtype=torch.bool)
    found[0, 1] = found[0, 2] = found[0, 3] = found[0, 4] = found[2, 2] = True
    study = torch.tensor([0, 1, 2, 3, 0])
    quality = robust.identification_quality(found, labels, study)
    # Scored: pairs of different studies with a finding known of both; 0-1 and 4-1 agree, both ways.
    assert quality == {"hits": 1, "suspected": 2, "actual": 4, "precision": 0.5, "recall": 0.25}
    nothing = robust.identification_quality(torch.zeros(5, 5, dtype=torch.bool), labels * NAN)
    assert np.isnan(nothing["precision"])
    assert np.isnan(nothing["recall"])


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Parameter(unit(5, 4, 10)), nn.Parameter(unit(5, 4, 11))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(image @ self.image, dim=-1), F.normalize(text @ self.text, dim=-1)


def rank_of_step(image: Tensor, text: Tensor, reports: Tensor, study: Tensor, first: int, mode: Any) -> dict[str, Any]:
    mine = own_rows(len(image), first)
    towers = Towers()
    model = nn.parallel.DistributedDataParallel(towers) if distributed.world_size() > 1 else towers
    gather = distributed.gather_with_gradient
    image_features, text_features = (gather(x) for x in model(image[mine], text[mine]))
    evidence = {
        "report": robust.report_evidence(gather(reports[mine])),
        "ema": robust.ema_evidence(image_features, text_features),
    }
    found, strength = robust.identify(evidence, {"report": 0.3, "ema": 0.4})
    fix = robust.correct(study_targets(gather(study[mine]), torch.float64), found, strength, mode)
    terms = contrastive_loss(
        image_features,
        text_features,
        4.0,
        targets=fix.targets,
        text_targets=fix.text_targets,
        denominator=fix.denominator,
    )
    terms["total"].backward()
    return {
        "total": terms["total"].detach(),
        "corrected": int(fix.corrected),
        "grads": [p.grad for p in towers.parameters()],
    }


@pytest.mark.ddp
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", ["relabel", "mask", "soft"])
def test_several_ranks_equal_one(pool: Callable[[int], Any], size: int, mode: str) -> None:
    arguments = {"image": unit(8, 5, 0), "text": unit(8, 5, 1), "reports": unit(8, 3, 2), "study": STUDY}
    arguments |= {"first": 5, "mode": mode}
    expected = rank_of_step(**arguments)
    assert expected["corrected"] > 0
    for result in pool(size).run(__file__, "rank_of_step", arguments):
        assert result["corrected"] == expected["corrected"]
        assert torch.allclose(result["total"], expected["total"], atol=1e-12)
        for value, gradient in zip(result["grads"], expected["grads"], strict=True):
            assert torch.allclose(value, gradient, atol=1e-12)
