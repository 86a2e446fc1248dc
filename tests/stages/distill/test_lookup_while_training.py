"""Lookups of stage 2 while it trains: live against static, what they cost, and features that depend on the row alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from torch import Tensor

from ctx_distill import distributed
from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.errors import InputError
from ctx_distill.models.ct_encoder import ResNet3D
from ctx_distill.models.opening import open_expert
from ctx_distill.retrieval.sharded import ShardedIndex
from ctx_distill.retrieval.store import XrayIndexArtefact
from ctx_distill.stages.distill.lookup_cost import LookupClock
from ctx_distill.stages.distill.targets import NeighbourSettings, ProjectionTeacher, RetrievedTeacher
from ctx_distill.stages.distill.task import DistillationTask
from ctx_distill.training.base_task import last_values
from ctx_distill.training.row_features import ReportFeatures, RowFeatures
from ctx_distill.types import CTBatch

pytestmark = pytest.mark.full
SPEC = VolumeSpec(spacing=(24.0, 24.0, 24.0), shape=(12, 16, 16))


def train(run: Path, cohort: Path, folder: Path, neighbours: NeighbourSettings) -> tuple[list[Any], DistillationTask]:
    """Two epochs; every term of every step, in full, and the task."""
    torch.manual_seed(0)
    task = DistillationTask(
        ResNet3D(variant="small"), str(run / "expert/artefact"), str(run / "index/artefact"), neighbours=neighbours,
        vocabulary="phantom",
    )  # fmt: skip
    terms: list[Any] = []
    log = task.log_terms

    def note(found: dict[str, Tensor], *rest: Any) -> None:
        terms.append({name: value.item() for name, value in found.items()})
        log(found, *rest)

    task.log_terms = note  # type: ignore[method-assign, assignment]
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(task, datamodule=CTDataModule(str(cohort / "ct.csv"), SPEC, batch_size=5))
    return terms, task


@pytest.mark.parametrize("mode", ["softmax", "mean"])
def test_static_equals_live_digit_for_digit_and_the_cost_is_logged(
    mode: Any, finished_run: Path, cohort: Path, tmp_path: Path
) -> None:
    asked = {"k": 5, "mode": mode, "rerank": mode == "mean"}
    live, task = train(finished_run, cohort, tmp_path / "live", NeighbourSettings(**asked))
    static, other = train(finished_run, cohort, tmp_path / "static", NeighbourSettings(**asked, lookup="static"))
    assert len(live) > 4
    assert live == static
    for one in (task, other):
        logged = one.trainer.callback_metrics
        assert 0 < float(logged["train/lookup_share"]) < 1
        assert float(logged["train/lookup_ms"]) > 0
        assert not any("lookup" in name for name in last_values(one))
    assert task.retrieved._static is None
    told = other.retrieved._static
    assert told is not None
    splits = pd.read_csv(cohort / "ct.csv")["split"]
    assert sorted(told) == splits.index[splits.isin(["train", "val"])].tolist()


def test_a_static_lookup_of_what_changes_is_refused() -> None:
    with pytest.raises(InputError, match=r"lookup is static, but subset_share is 0\.5"):
        NeighbourSettings(lookup="static", subset_share=0.5)
    with pytest.raises(InputError, match="mode is sample"):
        NeighbourSettings(lookup="static", mode="sample")


def test_features_of_a_row_do_not_depend_on_the_batch_that_asked_first(finished_run: Path, cohort: Path) -> None:
    expert = open_expert(str(finished_run / "expert/artefact"))
    module = CTDataModule(str(cohort / "ct.csv"), SPEC, eval_batch_size=64, projection=True)
    (batch,) = list(module.loader(module.manifest))
    assert isinstance(batch, CTBatch)
    rows = batch.row.tolist()

    def reports(parts: list[list[int]]) -> Tensor:
        asked, found = ReportFeatures(expert), {}
        for part in parts:
            texts = [batch.report[place] for place in part]
            found.update(zip(part, asked.embed(batch.row[part], texts, texts), strict=True))
        return torch.stack([found[place] for place in range(len(rows))])

    def projections(parts: list[list[int]]) -> Tensor:
        teacher, found = ProjectionTeacher(), {}
        for part in parts:
            assert batch.projection is not None
            few: Any = SimpleNamespace(row=batch.row[part], projection=batch.projection[part])
            found.update(zip(part, teacher.targets(few, expert), strict=True))
        return torch.stack([found[place] for place in range(len(rows))])

    everyone = list(range(len(rows)))
    for features in (reports, projections):
        together = features([everyone])
        assert torch.equal(together, features([[place] for place in everyone]))
        assert torch.equal(together, features([everyone[::3], everyone[::-1], everyone]))
    asked: list[list[int]] = []
    kept, numbers = RowFeatures(), list(range(len(rows)))
    for part in (rows[:3], rows[1:6]):
        kept.get(part, lambda new: (asked.append(numbers[new]), torch.zeros(1, 2))[1])
    assert asked == [[0], [1], [2], [2], [3], [4]]


def ranks_look_up(run: str, reports: list[str], settings: dict[str, Any]) -> list[Tensor]:
    """Live and static targets of this rank's rows; rank 0 has none that speaks, rank 1 is asked for all."""
    expert = open_expert(f"{run}/expert/artefact")
    store = XrayIndexArtefact.open(Path(run) / "index/artefact", "cpu", placement=settings["placement"])
    teacher = RetrievedTeacher(store, NeighbourSettings(**settings), "phantom", ReportFeatures(expert))
    own = ["" for _ in reports] if distributed.rank() == 0 and distributed.world_size() > 1 else reports
    rows = torch.arange(len(reports))
    seeds = rows.tolist()
    live = teacher.targets(rows, own, own, seeds)
    teacher.prepare(list(range(len(reports))), reports, torch.device("cpu"), batch=2)
    return [live, teacher.targets(rows, reports, reports, seeds)]


@pytest.mark.ddp
def test_targets_of_a_sharded_index_equal_the_replicated_one(
    finished_run: Path, cohort: Path, pool: Callable[[int], Any]
) -> None:
    module = CTDataModule(str(cohort / "ct.csv"), SPEC)
    reports = [module.manifest.report(row) for row in range(7)]
    settings = {"k": 6, "mode": "softmax", "rerank": True, "placement": "sharded"}
    arguments = {"run": str(finished_run), "reports": reports, "settings": settings}
    alone = ranks_look_up(str(finished_run), reports, {**settings, "placement": "replicated"})
    silent, asked = pool(2).run(__file__, "ranks_look_up", arguments)
    assert torch.equal(asked[0], alone[0])
    assert not silent[0].any()
    for found in (silent[1], asked[1], alone[1]):
        assert torch.equal(found, alone[0])


def test_placement_and_device_of_the_settings_reach_the_index(finished_run: Path) -> None:
    folders = str(finished_run / "expert/artefact"), str(finished_run / "index/artefact")
    sharded = NeighbourSettings(placement="sharded", device="cpu")
    task = DistillationTask(ResNet3D(variant="small"), *folders, neighbours=sharded, vocabulary="phantom")
    assert isinstance(task.store.index, ShardedIndex)
    assert task.store.index._device == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="FAISS has no GPU"):
            DistillationTask(
                ResNet3D(variant="small"), *folders, neighbours=NeighbourSettings(device="gpu"), vocabulary="phantom"
            )


def test_the_clock_adds_up_the_lookups_of_a_step() -> None:
    clock = LookupClock()
    clock.restart()
    for _ in range(2):
        with clock.measure(torch.device("cpu")):
            time.sleep(0.02)
    spent, share = clock.end_step()
    assert spent >= 40
    assert 0 < share <= 1
    assert clock.end_step()[0] == 0
