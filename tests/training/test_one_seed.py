"""One seed, `seed_everything`, moves everything that is drawn in training, and nothing else does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from ctx_distill.commands.main import main
from ctx_distill.data.loading.datamodules import CTDataModule, XrayDataModule
from ctx_distill.data.transforms.augment import Augmentation
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.losses import false_negatives as robust
from ctx_distill.stages.align import evidence as false_negatives
from ctx_distill.stages.align.task import AlignmentTask
from ctx_distill.stages.distill.anchors import Anchors
from ctx_distill.stages.distill.targets import NeighbourSettings, RetrievedTeacher
from ctx_distill.stages.expert import task as expert_module
from ctx_distill.stages.expert.task import ExpertTask
from ctx_distill.types import CTBatch

ROWS = 24
SENTENCES = ("The heart is enlarged.", "No pneumothorax.", "Small effusion.", "The aorta is elongated.")
REPORTS = [f"{' '.join(SENTENCES)} Study {i}." for i in range(ROWS)]
BATCH = CTBatch(torch.zeros(ROWS, 1, 4, 4, 4), torch.arange(ROWS), torch.arange(ROWS), REPORTS)


def order_of_cts(cohort: Path, epoch: int) -> Any:
    module = CTDataModule(str(cohort / "ct.csv"), VolumeSpec(spacing=(12, 12, 12), shape=(8, 8, 8)))
    shuffle = module.order(module.training_rows())
    shuffle.set_epoch(epoch)
    return list(shuffle)


def order_of_xrays(cohort: Path, epoch: int) -> Any:
    module = XrayDataModule(str(cohort / "xray.csv"))
    shuffle = module.order(module.training_rows())
    shuffle.set_epoch(epoch)
    return list(shuffle)


def aligned(epoch: int) -> dict[str, Any]:
    """The volumes, views and seeds of masks that stage 3 encodes in an epoch."""
    taken: dict[str, Any] = {}
    task: Any = AlignmentTask.__new__(AlignmentTask)  # without expert and index, which have no part in this
    L.LightningModule.__init__(task)
    task.trainer = SimpleNamespace(current_epoch=epoch)
    task.model = SimpleNamespace(
        encode_alone=lambda volume: taken.update(volumes=volume.tolist()) or (None, SimpleNamespace(tokens=None)),
        encode_text=lambda texts: taken.update(views=texts),
        text_encoder=None,
    )
    task.subset_share, task.augmentation = 0.75, replace(Augmentation(), noise=0.1)
    task.entity_masking = lambda encoder, reports, seeds, tokens: taken.update(masks=seeds) or ()
    task._encode(BATCH)
    return taken


def sections_of_the_expert(epoch: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    task: Any = ExpertTask()
    monkeypatch.setattr(ExpertTask, "current_epoch", epoch)
    task._sections = {i: (report, "An impression.") for i, report in enumerate(REPORTS)}
    task._reports = [(i, report, f"Impression {i}.") for i, report in enumerate(REPORTS * 3)]
    read: list[list[str]] = []
    monkeypatch.setattr(task, "_text", lambda texts: read.append(texts) or torch.ones(len(texts), 2))
    task.model = SimpleNamespace(logit_scale=torch.zeros(()))
    batch: Any = SimpleNamespace(row=torch.arange(ROWS), study=torch.arange(ROWS))
    task._section_to_section(batch, 0)
    return read


def sampled_neighbours(epoch: int) -> Any:
    """The uniform numbers by which stage 2 draws one neighbour for each report."""
    draws: list[Any] = []
    task: Any = AlignmentTask.__new__(AlignmentTask)
    L.LightningModule.__init__(task)
    task.trainer = SimpleNamespace(current_epoch=epoch)
    teacher: Any = RetrievedTeacher.__new__(RetrievedTeacher)
    teacher._static, teacher._reader = None, None
    teacher._queries = SimpleNamespace(embed=lambda rows, reports, views: torch.zeros(len(rows), 2))

    class Lookup:
        mode, store = "sample", SimpleNamespace(value_dim=3)

        def look_up(self, queries: Any, findings: Any, drawn: torch.Tensor) -> dict[str, torch.Tensor]:
            draws.append(drawn.tolist())
            return {"features": torch.zeros(len(queries), 3)}

    teacher.lookup = Lookup()
    teacher.targets(BATCH.row, REPORTS, REPORTS, task.row_seeds(BATCH.row, "neighbour"))
    return draws


def drawn_once(cohort: Path) -> dict[str, Any]:
    """What is drawn once in a stage, not in each epoch."""
    store: Any = SimpleNamespace(values=lambda rows: rows[:, None].float(), __len__=lambda: 50)

    class Store:
        def __len__(self) -> int:
            return 50

        def values(self, rows: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(rows, 50).float()

    del store, cohort
    bank = Anchors("bank", None, Store(), 10, "phantom")._fixed  # type: ignore[arg-type]
    assert bank is not None
    pairs: list[Any] = []

    def sample(*args: Any, **kwargs: Any) -> torch.Tensor:
        pairs.append(robust.sample_similarities(*args, **kwargs).tolist())
        return torch.ones(3)

    rows = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    found: Any = SimpleNamespace(settings=SimpleNamespace(quantile=0.5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(false_negatives, "sample_similarities", sample)
        patch.setattr(false_negatives, "PAIRS", 100)
        false_negatives.FalseNegatives._quantile(found, rows, rows, torch.arange(30))
    return {
        "bank": bank.tolist(),
        "control": NeighbourSettings(control="shuffled").seed_of_control(),
        "pairs of the threshold": pairs,
    }


def test_everything_drawn_follows_the_seed_and_the_epoch(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(seed: int, epoch: int) -> dict[str, Any]:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        torch.manual_seed(12345 + len(taken))  # torch's own state has no part in any of these
        found = {"order of CTs": order_of_cts(cohort, epoch), "order of X-rays": order_of_xrays(cohort, epoch)}
        found |= aligned(epoch) | drawn_once(cohort)
        found |= {"sections": sections_of_the_expert(epoch, monkeypatch), "neighbours": sampled_neighbours(epoch)}
        return found

    taken: list[dict[str, Any]] = []
    for seed, epoch in ((3, 0), (3, 0), (4, 0), (3, 1)):
        taken.append(drawn(seed, epoch))
    same, again, other_seed, other_epoch = taken
    assert len(same) == 10
    for name, value in same.items():
        assert again[name] == value, name
        assert other_seed[name] != value, name
        assert (other_epoch[name] != value) == (name not in ("bank", "control", "pairs of the threshold")), name


def test_a_given_seed_of_the_data_or_a_control_wins(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = VolumeSpec(spacing=(12, 12, 12), shape=(8, 8, 8))
    orders = set()
    for run in (3, 4):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(run))
        module = CTDataModule(str(cohort / "ct.csv"), spec, seed=0)
        orders.add(tuple(module.order(module.training_rows())))
        assert NeighbourSettings(control="shuffled", control_seed=0).seed_of_control() == 0
    assert len(orders) == 1


@pytest.mark.slow
def test_two_runs_of_one_seed_are_equal_and_of_two_are_not(
    cohort: Path, tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., list[str]] = expert_module.report_views
    read: list[list[str]] = []
    monkeypatch.setattr(expert_module, "report_views", lambda *given: read.append(real(*given)) or read[-1])

    def run(name: str, *options: str) -> dict[str, Any]:
        read.clear()
        given = ["expert", "--data", str(cohort), "--run", str(tmp_path / name), "--preset", str(tiny_preset)]
        assert main([*given, "--trainer.max_epochs=1", *options]) == 0
        folder = tmp_path / name / "expert"
        weights = load_file(next((folder / "artefact").glob("*.safetensors")))
        order = json.loads((folder / "training.json").read_text())["data_order"]
        return {"order": order, "views": [list(views) for views in read], "weights": weights}

    def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    one, again = run("one", "--seed_everything=3"), run("again", "--seed_everything=3")
    other = run("other", "--seed_everything=4")
    assert one["views"]
    assert (again["order"], again["views"]) == (one["order"], one["views"])
    assert equal(one["weights"], again["weights"])
    assert other["order"] != one["order"]
    assert other["views"] != one["views"]
    assert not equal(one["weights"], other["weights"])
