"""False negatives: evidence, identification, correction, and the corrected loss on one and two ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ranks import own_rows
from torch import Tensor, nn
from torch.nn import functional as F

from ctx_distill import distributed
from ctx_distill.losses import false_negatives as robust
from ctx_distill.losses.contrastive import contrastive_loss, study_targets
from ctx_distill.losses.pair_order import pair_hashes, study_identity
from ctx_distill.types import InputError

NAN = float("nan")
STUDY = torch.tensor([0, 1, 2, 2, 3, 4, 5, 6])
IDENTITY = study_identity([f"study-{code}" for code in STUDY.tolist()])


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
        result = robust.correct(base(), found, strength, mode, weight=0.25, identity=IDENTITY)  # type: ignore[arg-type]
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
        robust.correct(base(), found, strength, "drop", identity=IDENTITY)  # type: ignore[arg-type]


def test_identity_no_suspects_and_the_warm_up_change_nothing() -> None:
    none = robust.correct(base(), torch.zeros(8, 8, dtype=torch.bool), scores(0), "relabel", identity=IDENTITY)
    watching = robust.correct(
        base(), torch.ones(8, 8, dtype=torch.bool), scores(0), "mask", watch=True, identity=IDENTITY
    )
    for result in (none, watching):
        assert torch.allclose(result.targets, base())
        assert torch.allclose(result.text_targets, base())
        assert result.denominator.all()
        assert result.corrected == 0
    assert (none.suspected, watching.suspected) == (0, 64 - 10)


def test_at_most_half_of_a_row_and_column_the_strongest_first() -> None:
    strength = scores(3)
    result = robust.correct(base(), torch.ones(8, 8, dtype=torch.bool), strength, "mask", identity=IDENTITY)
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
    assert robust.correct(base(), one_row, strength, "mask", identity=IDENTITY).corrected == 3
    tied = robust.correct(base(), torch.ones(8, 8, dtype=torch.bool), torch.ones(8, 8), "mask", identity=IDENTITY)
    assert ((~tied.denominator).sum(1) <= negatives // 2).all()


def test_a_corrected_pair_is_no_longer_pushed_apart() -> None:
    image, text = unit(8, 6, 0), unit(8, 6, 1)
    found = torch.zeros(8, 8, dtype=torch.bool)
    found[0, 1] = True

    def pull(mode: str | None) -> float:
        """How the loss grows as image 0 moves towards text 1: positive pushes them apart."""
        moving = image.clone().requires_grad_()
        corrected = (
            None if mode is None else robust.correct(base(), found, scores(0), mode, weight=1.0, identity=IDENTITY)  # type: ignore[arg-type]
        )
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
        fix = robust.correct(base(), scores(1) > 0.6, scores(2), mode, identity=IDENTITY)

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
    assert quality == {"hits": 1, "suspected": 2, "actual": 4}
    nothing = robust.identification_quality(torch.zeros(5, 5, dtype=torch.bool), labels * NAN)
    assert nothing == {"hits": 0, "suspected": 0, "actual": 0}


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
    fix = robust.correct(
        study_targets(gather(study[mine]), torch.float64), found, strength, mode, identity=gather(IDENTITY[mine])
    )
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


def normal_batch(size: int, normals: int) -> tuple[Tensor, Tensor, Tensor]:
    """Findings of studies of which the first `normals` agree and the others differ from all; study codes; identities."""
    findings = torch.zeros(size, size)
    findings[normals:, normals:] = torch.eye(size - normals)
    return findings, torch.arange(size), study_identity([f"patient-{code}" for code in range(size)])


def corrected_of(findings: Tensor, study: Tensor, identity: Tensor, mode: Any = "mask") -> robust.Correction:
    found, strength = robust.identify({"findings": robust.findings_evidence(findings)}, {"findings": 1.0})
    return robust.correct(study_targets(study), found, strength, mode, identity=identity)


@pytest.mark.parametrize(("size", "normals"), [(64, 64), (128, 109)])
@pytest.mark.parametrize("mode", ["relabel", "mask", "soft"])
def test_the_order_of_the_batch_changes_no_pair(size: int, normals: int, mode: str) -> None:
    findings, study, identity = normal_batch(size, normals)
    straight = corrected_of(findings, study, identity, mode)
    assert torch.equal(straight.chosen, straight.chosen.T)
    assert straight.corrected > 0.8 * normals * min(normals - 1, size // 2)  # nearly as many as the cap allows,
    rows = straight.chosen.sum(1)[:normals]
    assert rows.max() <= (size - 1) // 2
    halves = rows[: normals // 2].float().mean(), rows[normals // 2 :].float().mean()
    assert 0.9 < halves[0] / halves[1] < 1.1  # and as many of the first half of the batch as of the second
    for seed in range(3):
        moved = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        again = corrected_of(findings[moved], study[moved], identity[moved], mode)
        for name in ("targets", "text_targets", "denominator", "chosen", "order"):
            assert torch.equal(getattr(again, name), getattr(straight, name)[moved][:, moved]), name


def test_asymmetric_evidence_leaves_out_the_same_pairs_in_both_directions() -> None:
    strength = (scores(5) * 3).round() / 3  # many ties, and (i, j) unlike (j, i)
    every = torch.ones(8, 8, dtype=torch.bool)
    straight = robust.correct(base(), every, strength, "soft", identity=IDENTITY)
    turned = robust.correct(base(), every, strength.T, "soft", identity=IDENTITY)
    assert torch.equal(turned.chosen, straight.chosen.T)
    assert torch.equal(turned.targets, straight.text_targets)
    moved = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    again = robust.correct(study_targets(STUDY[moved], torch.float64), every, strength[moved][:, moved], "soft",
                           identity=IDENTITY[moved])  # fmt: skip
    assert torch.equal(again.chosen, straight.chosen[moved][:, moved])


def test_images_of_one_study_are_corrected_together_and_never_more_than_half() -> None:
    study = torch.arange(12) // 3
    identity = study_identity([f"s{code}" for code in study.tolist()])
    fix = corrected_of(torch.zeros(12, 4), study, identity)
    assert fix.chosen.sum(1).max() <= 9 // 2
    groups = fix.chosen.view(4, 3, 4, 3).float().sum(dim=(1, 3))
    assert set(groups.unique().tolist()) <= {0.0, 9.0}
    assert fix.corrected > 0


def test_the_hash_of_a_pair_is_splitmix64_of_the_ids_and_symmetric() -> None:
    names = ["a", "b", "study 7"]
    identity, mask = study_identity(names), (1 << 64) - 1

    def expected(one: str, other: str) -> int:
        both = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in (one, other))
        mixed = sum(int.from_bytes(part, "big") for part in both) & mask
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = ((mixed ^ (mixed >> shift)) * factor) & mask
        return (mixed ^ (mixed >> 31)) >> 21

    found = pair_hashes(identity, identity)
    assert found.tolist() == [[expected(one, other) for other in names] for one in names]
    assert torch.equal(identity, study_identity(["x", *names])[1:])
    many = study_identity([str(n) for n in range(400)])
    every = pair_hashes(many[:300], many[300:])
    assert len(every.unique()) == every.numel()
    assert torch.equal(every, pair_hashes(many[300:], many[:300]).T)
    # For each study the others come in an order of its own: a rank correlation near 0.
    places = every[:2].argsort(dim=1).argsort(dim=1).double()
    assert abs(float(torch.corrcoef(places)[0, 1])) < 0.3


def test_a_threshold_one_bit_above_one_suspects_identical_reports() -> None:
    rows = unit(300, 7, 4).float()[torch.arange(300) % 3]  # three reports, each a hundred times
    same = torch.arange(300)[:, None] % 3 == torch.arange(300)[None] % 3
    evidence = robust.report_evidence(rows)
    above = float(np.nextafter(np.float32(1), np.float32(2)))
    for threshold in (above, 1.0, robust.threshold_from_quantile(robust.sample_similarities(rows, pairs=5000), 0.9)):
        found, strength = robust.identify({"report": evidence}, {"report": threshold})
        assert torch.equal(found, same)
        assert torch.equal(strength, same.float())
    assert not robust.suspects(torch.tensor(1.0 - 2 * robust.TOLERANCE), above)


def test_evidence_does_not_depend_on_autocast_or_the_company() -> None:
    rows = unit(40, 64, 9).float()
    plain = robust.report_evidence(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(robust.report_evidence(rows), plain)
        assert torch.equal(robust.ema_evidence(rows, rows), plain)
    assert torch.equal(robust.report_evidence(rows[7:12]), plain[7:12, 7:12])


def rank_of_tied_step(mode: Any) -> dict[str, Any]:
    """A step on 48 studies, 85 % of them normal: each rank takes every n-th row, as the sampler deals them."""
    size = 48
    findings, study, identity = normal_batch(size, 41)
    image, text = unit(size, 5, 0), unit(size, 5, 1)
    gather, mine = distributed.gather_with_gradient, slice(distributed.rank(), None, distributed.world_size())
    fix = corrected_of(gather(findings[mine]), gather(study[mine]), gather(identity[mine]), mode)
    loss = contrastive_loss(
        gather(image[mine]), gather(text[mine]), 4.0,
        targets=fix.targets, text_targets=fix.text_targets, denominator=fix.denominator,
    )  # fmt: skip
    pairs = {tuple(sorted(ij)) for ij in gather(study[mine])[fix.chosen.nonzero()].tolist()}
    return {"total": loss["total"], "pairs": sorted(pairs)}


@pytest.mark.ddp
@pytest.mark.parametrize("mode", ["relabel", "mask", "soft"])
def test_two_ranks_correct_the_pairs_of_one_where_evidence_ties(pool: Callable[[int], Any], mode: str) -> None:
    expected = rank_of_tied_step(mode)
    assert len(expected["pairs"]) > 300
    for result in pool(2).run(__file__, "rank_of_tied_step", {"mode": mode}):
        assert result["pairs"] == expected["pairs"]
        assert torch.allclose(result["total"], expected["total"], rtol=0, atol=1e-6)
