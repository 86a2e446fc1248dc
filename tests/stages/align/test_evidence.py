"""Evidence of false negatives: thresholds of training pairs alone, the warm-up, the moving average, and the counts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctx_distill import distributed
from ctx_distill.data.manifests.manifest import Manifest, read_manifest
from ctx_distill.errors import InputError
from ctx_distill.losses.contrastive import contrastive_loss
from ctx_distill.losses.pair_order import study_identity
from ctx_distill.stages.align.evidence import FalseNegatives, RobustSettings
from ctx_distill.stages.align.moving_average import MovingAverage
from ctx_distill.stages.align.training_reports import TrainingReports
from ctx_distill.types import CTBatch


def unit(rows: int, dimension: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dimension, generator=draw, dtype=torch.float64), dim=-1).to(dtype)


class WordCounts:
    """Stands in for the expert: texts of the same words lie near each other."""

    has_text = True
    words = ("effusion", "nodule", "normal", "no", "left", "right", "heart", "clear", "size", "lung")

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        counts = torch.tensor([[1.0 + text.lower().count(word) for word in self.words] for text in texts])
        return F.normalize(counts, dim=-1)


class Rotated:
    """Stands in for the lookup: another space in which other pairs are near."""

    def look_up(self, queries: Tensor) -> dict[str, Tensor]:
        return {"features": F.normalize(queries @ unit(queries.shape[1], 3, 7), dim=-1)}


class Scores:
    """Stands in for the moving average: features a row, kept in a table."""

    def __init__(self, image: Tensor, text: Tensor, threshold: float = math.inf) -> None:
        self.image, self.text, self.threshold = image, text, torch.tensor(threshold)
        self.encoded = 0

    def encode(self, volume: Tensor, reports: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.encoded += len(reports)
        rows = volume[:, 0, 0, 0, 0].long()
        return self.image[rows], self.text[rows]


def reports_of(manifest: Manifest) -> TrainingReports:
    expert: Any = WordCounts()
    return TrainingReports(manifest.split("train"), expert, expert)


def made(settings: RobustSettings, manifest: Manifest, scores: Any = None) -> FalseNegatives:
    lookup: Any = Rotated()
    return FalseNegatives(settings, reports_of(manifest), lookup, scores)


def batch_of(manifest: Manifest, labels: Tensor | None = None) -> CTBatch:
    """All training rows; a volume holds its row's place, so that `Scores` knows it."""
    train = manifest.split("train")
    rows = [int(row) for row in train.frame.index]
    volume = torch.arange(float(len(rows))).view(-1, 1, 1, 1, 1)
    study = torch.tensor(train.study_codes())
    return CTBatch(volume, study, torch.tensor(rows), [train.report(row) for row in rows], labels)


@pytest.fixture(scope="module")
def manifest(cohort: Path) -> Manifest:
    return read_manifest(cohort / "ct.csv")


def test_quantile_thresholds_are_those_of_training_pairs(manifest: Manifest) -> None:
    found = made(RobustSettings(("report", "retrieved", "findings"), quantile=0.8), manifest)
    reports = reports_of(manifest)
    expected = {"report": WordCounts().encode_text(reports.reports)}
    expected["retrieved"] = Rotated().look_up(expected["report"])["features"]
    other = reports.study[:, None] != reports.study[None]
    for kind, rows in expected.items():
        every = (rows @ rows.T)[other].numpy()
        assert np.mean(every < found.thresholds[kind] - 1e-6) <= 0.81, kind
        assert np.mean(every <= found.thresholds[kind] + 1e-6) >= 0.79, kind
    assert found.thresholds["findings"] == 1.0
    given = {"report": 0.4, "findings": 0.5}
    fixed = made(RobustSettings(("report", "retrieved", "findings"), quantile=0.8, thresholds=given), manifest)
    assert fixed.thresholds == {**given, "retrieved": found.thresholds["retrieved"]}


def test_val_and_test_reports_change_nothing(manifest: Manifest) -> None:
    settings = RobustSettings(("report", "retrieved", "findings"), vocabulary="phantom")
    frame = manifest.frame.copy()
    frame.loc[frame["split"] != "train", "findings"] = "Nodule nodule nodule left."
    before = made(settings, manifest)
    after = made(settings, Manifest(manifest.path, frame, manifest.finding_names))
    assert after.thresholds == before.thresholds
    assert before.tables.keys() == {"report", "retrieved", "findings"}
    for kind, table in before.tables.items():
        torch.testing.assert_close(after.tables[kind], table, equal_nan=True)
        assert len(table) == len(manifest.split("train"))


def test_the_warm_up_watches_and_studies_are_never_corrected_away(manifest: Manifest) -> None:
    batch = batch_of(manifest)
    batch.study[1] = batch.study[0]
    found = made(RobustSettings(("report",), mode="mask", quantile=0.3, warmup_epochs=2), manifest)
    features = found.features(batch)
    for epoch in (0, 1):
        correction, suspects = found.corrections(features, batch.study, epoch)
        assert correction.suspected > 0
        assert correction.corrected == 0
        assert correction.denominator.all()
    correction, after = found.corrections(features, batch.study, 2)
    assert torch.equal(after, suspects)
    gone = ~correction.denominator
    assert gone.sum() == correction.corrected > 0
    assert not gone[batch.study[:, None] == batch.study[None]].any()
    negatives = (batch.study[:, None] != batch.study[None]).sum(1)
    assert (gone.sum(1) <= negatives // 2).all()


def test_kinds_are_joined_by_any_or_all(manifest: Manifest) -> None:
    kinds = ("report", "findings", "retrieved", "ema")
    batch = batch_of(manifest)
    rows = len(batch.row)
    scores = Scores(unit(rows, 4, 0), unit(rows, 4, 1), threshold=0.1)
    options: dict[str, Any] = {"quantile": 0.4, "vocabulary": "phantom"}
    alone = {}
    for kind in kinds:
        found = made(RobustSettings((kind,), **options), manifest, scores if kind == "ema" else None)
        alone[kind] = found.corrections(found.features(batch), batch.study, 1)[1]
        assert alone[kind].any()
    assert torch.equal(alone["ema"], scores.image @ scores.text.T >= 0.1)
    for combine, expected in (("any", torch.stack([*alone.values()]).any(0)),
                              ("all", torch.stack([*alone.values()]).all(0))):  # fmt: skip
        found = made(RobustSettings(kinds, combine=combine, **options), manifest, scores)  # type: ignore[arg-type]
        assert torch.equal(found.corrections(found.features(batch), batch.study, 1)[1], expected)


class Loader:
    """Stands in for the data module: training rows as one batch a row."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def training_rows(self) -> Manifest:
        return self.manifest.split("train")

    def loader(self, rows: Manifest) -> list[CTBatch]:
        whole = batch_of(self.manifest)
        wanted = [place for place, row in enumerate(whole.row.tolist()) if row in rows.frame.index]
        return [
            CTBatch(whole.volume[[place]], whole.study[[place]], whole.row[[place]], [whole.report[place]])
            for place in wanted
        ]


def test_the_moving_average_suspects_nothing_until_its_threshold_is_fixed(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(manifest)
    rows = len(batch.row)
    scores = Scores(unit(rows, 4, 0), unit(rows, 4, 1))
    found = made(RobustSettings(("ema",), quantile=0.7, warmup_epochs=2), manifest, scores)
    assert [found.needs_threshold(epoch) for epoch in (0, 1, 2, 3)] == [False, False, True, True]
    correction, suspects = found.corrections(found.features(batch), batch.study, 0)
    assert scores.encoded == 0
    assert not suspects.any()
    assert correction.suspected == 0

    data: Any = Loader(manifest)
    state = torch.get_rng_state()
    found.fix_threshold(found.measure_threshold(data))
    assert torch.equal(torch.get_rng_state(), state)
    assert scores.encoded == rows
    other = batch.study[:, None] != batch.study[None]
    every = (scores.image @ scores.text.T)[other]
    assert found.all_thresholds()["ema"] == pytest.approx(float(every.quantile(0.7)), abs=0.02)
    assert not found.needs_threshold(3)
    suspects = found.corrections(found.features(batch), batch.study, 2)[1]
    assert float(suspects[other].float().mean()) == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(suspects, suspects.T)

    monkeypatch.setattr("ctx_distill.stages.align.evidence.MEASURED_VOLUMES", 5)
    scores.encoded = 0
    again = found.measure_threshold(data)
    assert scores.encoded == 5
    random.seed(99)
    torch.manual_seed(99)
    assert found.measure_threshold(data) == again


def test_the_moving_average_s_quantile_needs_a_warm_up() -> None:
    assert not RobustSettings(("report",), warmup_epochs=0).needs_moving_average()
    assert RobustSettings(("report", "ema"), warmup_epochs=1).needs_moving_average()
    assert RobustSettings(("ema",), warmup_epochs=0, thresholds={"ema": 0.5}).needs_moving_average()
    with pytest.raises(InputError, match=r"warmup_epochs is 0\. Set robust.warmup_epochs=1"):
        RobustSettings(("ema",), warmup_epochs=0).needs_moving_average()


class Tiny(nn.Module):
    """Stands in for the dual encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.dropout = nn.Dropout(0.5)


def test_the_moving_average_follows_by_hand_and_stays_frozen() -> None:
    model: Any = Tiny()
    copy = MovingAverage(model, decay=0.9)
    assert math.isinf(copy.threshold)
    values = [torch.tensor([3.0, 0.0]), torch.tensor([5.0, 1.0]), torch.tensor([-1.0, 2.0])]
    expected = values[0]
    for step, value in enumerate(values):
        model.weight.data.copy_(value)
        copy.update_parameters(model)
        expected = value if step == 0 else 0.9 * expected + 0.1 * value
    inner: Any = copy.module
    torch.testing.assert_close(inner.weight.data, expected)
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert model.weight.requires_grad
    assert not copy.train().module.dropout.training  # type: ignore[union-attr]

    copy.threshold.fill_(0.25)
    resumed = MovingAverage(Tiny(), decay=0.9)  # type: ignore[arg-type]
    resumed.load_state_dict(copy.state_dict())
    assert float(resumed.threshold) == 0.25
    model.weight.data.zero_()
    for one in (copy, resumed):
        one.update_parameters(model)
    torch.testing.assert_close(resumed.module.weight, copy.module.weight)


ROWS, DIMENSION = 9, 4
STUDIES = [0, 1, 2, 2, 3, 4, 5, 6, 7]


def frozen(mode: Any) -> FalseNegatives:
    """Evidence of nine rows without a manifest, on whichever rank."""
    scores: Any = Scores(unit(ROWS, 3, 2), unit(ROWS, 3, 3), threshold=0.2)
    reports: Any = SimpleNamespace(
        reports=[f"report {row}" for row in range(ROWS)],
        study=torch.tensor(STUDIES),
        identity=study_identity([f"s{code}" for code in STUDIES]),
        has_report=np.ones(ROWS, dtype=bool),
        embeddings=unit(ROWS, 3, 4),
        places=lambda rows: rows.cpu(),
    )
    settings = RobustSettings(("report", "ema"), mode=mode, quantile=0.6, warmup_epochs=0, thresholds={"ema": 0.2})
    lookup: Any = None
    return FalseNegatives(settings, reports, lookup, scores)


def rank_of_step(mode: str, first: int) -> dict[str, Any]:
    mine = slice(0, first) if distributed.rank() == 0 else slice(first, None)
    if distributed.world_size() == 1:
        mine = slice(None)
    image = unit(ROWS, DIMENSION, 0, torch.float64)[mine].requires_grad_()
    text = unit(ROWS, DIMENSION, 1, torch.float64)[mine].requires_grad_()
    labels = torch.randint(0, 2, (ROWS, 2), generator=torch.Generator().manual_seed(0)).float()
    rows = torch.arange(ROWS)[mine]
    batch = CTBatch(
        rows.float().view(-1, 1, 1, 1, 1), torch.tensor(STUDIES)[mine], rows, ["x"] * len(rows), labels[mine]
    )
    found, gather = frozen(mode), distributed.gather_with_gradient
    for _ in range(2):  # two steps of an epoch
        scale = torch.tensor(4.0, dtype=torch.float64)
        terms = found.loss(gather(image), gather(text), scale, gather(batch.study), batch, epoch=0)
    terms["total"].backward()
    assert image.grad is not None
    assert text.grad is not None
    return {"total": terms["total"].detach(), "image": image.grad, "text": text.grad, "counts": found.drain_counts(),
            "drained": found.drain_counts(),
            "pairs": found.pairs.frame({n: f"s{n}" for n in STUDIES}, found.all_thresholds()).to_csv(index=False)}  # fmt: skip


def test_counts_are_those_of_the_epoch() -> None:
    result = rank_of_step("relabel", 0)
    found, study = frozen("relabel"), torch.tensor(STUDIES)
    cosine, score = (found.tables["report"] @ found.tables["report"].T), unit(ROWS, 3, 2) @ unit(ROWS, 3, 3).T
    other = study[:, None] != study[None]
    suspects = ((cosine >= found.thresholds["report"]) | (score >= 0.2)) & other
    labels = torch.randint(0, 2, (ROWS, 2), generator=torch.Generator().manual_seed(0))
    same = (labels[:, None] == labels[None]).all(-1) & other
    counts = result["counts"]
    assert counts["suspected_pairs"] == 2 * int(suspects.sum()) > 0
    assert counts["suspected_share"] == int(suspects.sum()) / (ROWS * (ROWS - 1))
    assert 0 < counts["corrected_pairs"] <= counts["suspected_pairs"]
    assert counts["false_negative_precision"] == int((suspects & same).sum()) / int(suspects.sum())
    assert counts["false_negative_recall"] == int((suspects & same).sum()) / int(same.sum())
    assert result["drained"] == {"suspected_pairs": 0, "corrected_pairs": 0}
    plain = contrastive_loss(
        unit(ROWS, DIMENSION, 0, torch.float64), unit(ROWS, DIMENSION, 1, torch.float64), 4.0, study=study
    )
    assert result["total"] != plain["total"]


@pytest.mark.ddp
@pytest.mark.parametrize(("mode", "first"), [("relabel", 6), ("mask", 4), ("soft", 6)])
def test_two_ranks_correct_and_count_as_one(pool: Callable[[int], Any], mode: str, first: int) -> None:
    expected = rank_of_step(mode, first)
    results = pool(2).run(__file__, "rank_of_step", {"mode": mode, "first": first})
    for result in results:
        assert result["counts"] == expected["counts"]
        assert result["pairs"] == expected["pairs"]
        assert len(result["pairs"].splitlines()) > 3
        torch.testing.assert_close(result["total"], expected["total"], rtol=0, atol=1e-12)
    for name in ("image", "text"):  # each rank has the sum over two ranks, of which DDP takes the mean
        joined = torch.cat([result[name] for result in results]) / 2
        torch.testing.assert_close(joined, expected[name], rtol=0, atol=1e-12)
