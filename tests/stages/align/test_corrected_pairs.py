"""The record of corrected pairs against a plain count over every pair, after a resume, and as a file."""

from __future__ import annotations

import io
from collections import defaultdict
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctx_distill.losses.contrastive import study_targets
from ctx_distill.losses.false_negatives import (
    contradictions,
    correct,
    ema_evidence,
    findings_evidence,
    identify,
    report_evidence,
)
from ctx_distill.losses.pair_order import study_identity
from ctx_distill.stages.align.corrected_pairs import CorrectedPairs

STUDIES, BATCH, STEPS = 40, 12, 30
THRESHOLDS = {"report": 0.3}
KEPT = {"strongest": 7, "contradicted": 5, "borderline": 6}


def embeddings() -> Tensor:
    rows = F.normalize(torch.randn(STUDIES, 3, generator=torch.Generator().manual_seed(1)), dim=-1)
    rows[5] = rows[9] = rows[17] = rows[30]  # ties of strength 1
    return rows


def labels() -> Tensor:
    drawn = torch.randint(0, 4, (STUDIES, 3), generator=torch.Generator().manual_seed(2)).float()
    return torch.where(drawn == 3, torch.nan, drawn - (drawn == 2) * 3)  # 0, 1, -1, blank


def batches() -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(0, STUDIES, (BATCH,), generator=draw) for _ in range(STEPS)]


def take(record: CorrectedPairs, study: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
    """A step of a global batch, in which a study may stand twice; gives what was suspected and corrected."""
    rows = embeddings()[study]
    evidence = {"report": report_evidence(rows)}
    suspects, strength = identify(evidence, THRESHOLDS)
    identity = study_identity([ids()[code] for code in study.tolist()])
    correction = correct(study_targets(study), suspects, strength, "relabel", watch=epoch < 1, identity=identity)
    record.observe(correction, evidence, study, labels()[study], contradictions(labels()[study]), epoch)
    return correction.pairs, correction.chosen


def ids() -> dict[int, str]:
    return {code: f"s{code:02d}" for code in range(STUDIES)}


def test_what_is_kept_is_a_plain_count_over_every_pair() -> None:
    record = CorrectedPairs(("report",), KEPT)
    seen: dict[tuple[int, int], dict[str, list[int]]] = defaultdict(lambda: {"suspected": [], "corrected": []})
    images = [0, 0]
    for step, study in enumerate(batches()):
        epoch = step // 6
        for which, matrix in enumerate(take(record, study, epoch)):
            name = ("suspected", "corrected")[which]
            images[which] += int((matrix | matrix.T).triu().sum())
            here = {tuple(sorted((int(study[i]), int(study[j])))) for i, j in matrix.nonzero().tolist()}
            for pair in here:
                seen[pair][name].append(epoch)
    rows, truth = embeddings().double(), labels()
    value = {pair: round(float(rows[pair[0]] @ rows[pair[1]]), 6) for pair in seen}
    both = {p: ((truth[p[0]] >= 0) & (truth[p[1]] >= 0)) for p in seen}
    differ = {p: int((both[p] & (truth[p[0]] != truth[p[1]])).sum()) for p in seen}
    frame = record.frame(ids(), THRESHOLDS).set_index(["study_id", "other_study_id"])
    assert len(seen) > 3 * len(frame)  # so that much had to go

    def of(why: str) -> list[tuple[int, int]]:
        kept = frame[frame["kept_as"].str.split("+").map(lambda all: why in all)]
        return [(int(one[1:]), int(other[1:])) for one, other in kept.index]

    wrong = [p for p in seen if differ[p]]
    for why, pool, sign in (("strongest", seen, -1), ("contradicted", wrong, -1), ("borderline", seen, 1)):
        expected = sorted(sign * value[p] for p in pool)[: KEPT[why]]
        assert sorted(sign * value[p] for p in of(why)) == pytest.approx(expected, abs=2e-6), why
    for pair in {*of("strongest"), *of("contradicted"), *of("borderline")}:
        row, epochs = frame.loc[(f"s{pair[0]:02d}", f"s{pair[1]:02d}")], seen[pair]
        assert row["report"] == pytest.approx(value[pair], abs=2e-6)
        assert row["strength"] == pytest.approx((value[pair] - 0.3) / 0.7, abs=3e-6)
        assert (row["suspected_batches"], row["corrected_batches"]) == tuple(len(e) for e in epochs.values())
        assert (row["suspected_epochs"], row["corrected_epochs"]) == tuple(len(set(e)) for e in epochs.values())
        assert (row["first_epoch"], row["last_epoch"]) == (epochs["suspected"][0], epochs["suspected"][-1])
        assert (row["labels_known"], row["labels_differ"]) == (int(both[pair].sum()), differ[pair])
        assert row["evidence"] == "report"
    assert record.totals == {"suspected": images[0], "corrected": images[1]}
    assert 0 < record.totals["corrected"] < record.totals["suspected"]


def test_a_resume_gives_the_same_bytes(tmp_path: Path) -> None:
    whole, half = CorrectedPairs(("report",), KEPT), CorrectedPairs(("report",), KEPT)
    for step, study in enumerate(batches()):
        take(whole, study, step // 6)
        if step == 13:
            content = io.BytesIO()
            torch.save(half.state(), content)
            content.seek(0)
            half = CorrectedPairs(("report",), KEPT)
            half.load_state(torch.load(content, weights_only=True))
        take(half, study, step // 6)
    for name, record in (("whole.csv", whole), ("half.csv", half)):
        record.write(tmp_path / name, ids(), THRESHOLDS)
    assert (tmp_path / "whole.csv").read_bytes() == (tmp_path / "half.csv").read_bytes()
    assert len(pd.read_csv(tmp_path / "whole.csv")) >= max(KEPT.values())


def test_the_place_in_the_batch_changes_nothing() -> None:
    one, other = CorrectedPairs(("report",), KEPT), CorrectedPairs(("report",), KEPT)
    for study in batches():
        take(one, study, 0)
        take(other, study.flip(0), 0)
    assert one.frame(ids(), THRESHOLDS).equals(other.frame(ids(), THRESHOLDS))


class EveryPair(CorrectedPairs):
    """Takes every suspected pair of a batch to the host, as a plain count would."""

    def _select(self, order: Tensor, contradicted: Tensor | None) -> tuple[Tensor, Tensor]:
        del contradicted
        i, j = (order >= 0).nonzero(as_tuple=True)
        return i, j


@pytest.mark.parametrize("kinds", [("findings",), ("report", "findings"), ("findings", "ema")])
def test_few_pairs_go_to_the_host_and_nothing_that_is_kept_is_lost(kinds: tuple[str, ...]) -> None:
    draw = torch.Generator().manual_seed(7)
    images, size = 300, 64
    study = torch.arange(images) if "ema" in kinds else torch.arange(images) // 2
    codes = study.unique()
    normal = torch.rand(len(codes), generator=draw) < 0.85
    findings = torch.where(normal[:, None], 0.0, torch.randint(0, 2, (len(codes), 4), generator=draw).float())[study]
    truth = (torch.rand(len(codes), 3, generator=draw) < 0.1).float()[study]
    reports = findings @ torch.randn(4, 6, generator=draw) + 1
    image, text = torch.randn(2, images, 4, generator=draw)
    identity = study_identity([f"s{code}" for code in study.tolist()])
    thresholds = {"findings": 1.0, "report": 0.7, "ema": 0.6}
    record, every = CorrectedPairs(kinds, KEPT), EveryPair(kinds, KEPT)
    taken: list[int] = []
    for step in range(24):
        rows = torch.randperm(images, generator=draw)[:size]
        evidence = {
            "findings": findings_evidence(findings[rows]),
            "report": report_evidence(reports[rows]),
            "ema": ema_evidence(image[rows], text[rows]),
        }
        evidence = {kind: evidence[kind] for kind in kinds}
        found, strength = identify(evidence, {kind: thresholds[kind] for kind in kinds})
        fix = correct(study_targets(study[rows]), found, strength, "mask", watch=step < 4, identity=identity[rows])
        labels = truth[rows]
        taken.append(len(record._select(fix.order, contradictions(labels))[0]))
        for one in (record, every):
            one.observe(fix, evidence, study[rows], labels, contradictions(labels), step // 6)
    names = {int(code): f"s{code}" for code in codes}
    frame = record.frame(names, thresholds)
    assert len(frame) >= max(KEPT.values())  # a pair may be kept for two reasons
    pd.testing.assert_frame_equal(frame, every.frame(names, thresholds))
    assert record.totals == every.totals
    assert record.totals["suspected"] > 24 * 1000
    assert max(taken) < 500  # of more than 1,000 in each batch


def test_the_record_of_an_older_checkpoint_begins_anew() -> None:
    record = CorrectedPairs(("report",), KEPT)
    take(record, batches()[0], 1)
    state = record.state()
    for table in state["tables"].values():
        del table["order"]
    resumed = CorrectedPairs(("report",), KEPT)
    resumed.load_state(state)
    assert resumed.totals == record.totals
    assert resumed.frame(ids(), THRESHOLDS).empty


@pytest.mark.full
def test_a_run_writes_its_pairs_by_their_ids(finished_run: Path, cohort: Path) -> None:
    frame = pd.read_csv(finished_run / "align" / "corrected.csv", dtype={"study_id": str, "other_study_id": str})
    manifest = pd.read_csv(cohort / "ct.csv", dtype=str).set_index("study_id")
    train = set(manifest.index[manifest["split"] == "train"])
    assert len(frame) > 0
    assert set(frame["study_id"]) | set(frame["other_study_id"]) <= train
    names = [column for column in manifest.columns if column.startswith("label:")]
    for row in frame.itertuples():
        one, other = (manifest.loc[study, names].astype(float) for study in (row.study_id, row.other_study_id))
        assert row.labels_differ == int((one != other).sum())
