"""Stage 2 as a task: what its targets and anchors are, that the teacher stays as it is, and what it refuses."""

from __future__ import annotations

import itertools
import math
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctx_distill.data.io.volume import read_volume
from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.data.transforms.projection import square_projection
from ctx_distill.errors import InputError
from ctx_distill.models.ct_encoder import ResNet3D
from ctx_distill.models.opening import open_expert
from ctx_distill.retrieval.lookup import NeighbourLookup
from ctx_distill.retrieval.store import XrayIndexArtefact, write_index_artefact
from ctx_distill.stages.distill import task as distillation
from ctx_distill.stages.distill.anchors import Anchors
from ctx_distill.stages.distill.targets import NeighbourSettings, OracleTeacher, TeacherSettings
from ctx_distill.stages.distill.task import DistillationSchedule, DistillationTask, DistillationWeights
from ctx_distill.stages.shared.report_views import report_views
from ctx_distill.text.extractor import extract, load_vocabulary
from ctx_distill.types import CTBatch

pytestmark = pytest.mark.full
SPEC = VolumeSpec(spacing=(24.0, 24.0, 24.0), shape=(12, 16, 16))
BOTH = TeacherSettings(retrieved=1.0, projection=0.5)


def data(folder: Path, **settings: Any) -> CTDataModule:
    return CTDataModule(str(folder / "ct.csv"), SPEC, batch_size=6, **settings)


def task_of(run: Path, **settings: Any) -> DistillationTask:
    torch.manual_seed(0)
    settings = {"vocabulary": "phantom", **settings}
    folders = str(run / "expert/artefact"), str(run / "index/artefact")
    return DistillationTask(ResNet3D(variant="small"), *folders, **settings)


def fit(task: DistillationTask, module: CTDataModule, folder: Path, epochs: int = 1) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(task, datamodule=module)
    return trainer


def val_batch(folder: Path, **settings: Any) -> CTBatch:
    module = data(folder, **settings)
    batch = next(iter(module.loader(module.manifest.split("val"))))
    assert isinstance(batch, CTBatch)
    return batch


@pytest.fixture(scope="module")
def without_a_report(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cohort's CTs, the first two of `train` and the first of `val` without any text."""
    folder = tmp_path_factory.mktemp("silent")
    shutil.copytree(cohort / "ct", folder / "ct")
    table = pd.read_csv(cohort / "ct.csv", dtype=str, keep_default_na=False)
    rows = [*table.index[table["split"] == "train"][:2], table.index[table["split"] == "val"][0]]
    table.loc[rows, ["findings", "impression"]] = ""
    table.to_csv(folder / "ct.csv", index=False)
    return folder


def test_the_teacher_stays_frozen_and_is_neither_trained_nor_saved(
    finished_run: Path, cohort: Path, tmp_path: Path
) -> None:
    task = task_of(finished_run, teachers=BOTH)
    teacher = task.teacher
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = {name: value.clone() for name, value in task.state_dict().items()}
    trainer = fit(task, data(cohort, projection=True), tmp_path)
    after = teacher.state_dict()
    assert all(value.numpy().tobytes() == after[name].numpy().tobytes() for name, value in before.items())
    assert any(not torch.equal(value, student[name]) for name, value in task.state_dict().items())
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    own = {id(parameter) for parameter in teacher.parameters()}
    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(parameter) for parameter in task.parameters()}
    assert not own & optimised
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(task.state_dict()) == set(student)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"encoder", "projection"}
    assert saved["expert"] == teacher.fingerprint()


def test_the_target_is_the_retrieved_xrays_and_the_projection(finished_run: Path, cohort: Path) -> None:
    batch = val_batch(cohort, projection=True)
    expert = open_expert(str(finished_run / "expert/artefact"))
    lookup = NeighbourLookup(XrayIndexArtefact.open(finished_run / "index/artefact"), 8, "mean")
    retrieved = lookup.look_up(expert.encode_text(batch.report))["features"].numpy()
    files = [data(cohort).manifest.image_file(row) for row in batch.row.tolist()]
    pictures = [expert.preprocess(square_projection(read_volume(file)).numpy()) for file in files]
    projected = expert.encode_image(torch.stack(pictures)).numpy()
    alone = TeacherSettings(retrieved=0.0, projection=1.0)
    for settings, expected in ((TeacherSettings(), retrieved), (alone, projected), (BOTH, retrieved + 0.5 * projected)):
        task = task_of(finished_run, teachers=settings)
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        for _ in range(2):  # the second time out of what was kept
            np.testing.assert_allclose(task._target(batch, batch.report).numpy(), expected, atol=1e-5)


def test_a_ct_without_a_report_is_distilled_towards_its_projection_alone(
    finished_run: Path, without_a_report: Path, tmp_path: Path
) -> None:
    task = task_of(finished_run, teachers=BOTH)
    batch = val_batch(without_a_report, projection=True)
    assert [bool(report) for report in batch.report[:2]] == [False, True]
    target, own = task._target(batch, batch.report), task.projection_teacher.targets(batch, task.teacher)
    torch.testing.assert_close(target[0], own[0])
    assert not torch.allclose(target[1], own[1])
    anchors = task._anchors_of(batch, batch.report)
    assert anchors is not None
    torch.testing.assert_close(anchors, task.teacher.encode_text([report for report in batch.report if report]))
    trainer = fit(task, data(without_a_report, projection=True, text="optional"), tmp_path)
    assert math.isfinite(trainer.callback_metrics["train/loss"])
    with pytest.raises(InputError, match=r"3 CTs of `train` and `val` have no report text.*text=required"):
        fit(task_of(finished_run), data(without_a_report), tmp_path / "refused")
    fit(task_of(finished_run), data(without_a_report, text="required"), tmp_path / "left out")


def test_a_view_of_the_report_is_a_function_of_epoch_and_row(
    finished_run: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(finished_run, neighbours=NeighbourSettings(subset_share=0.6))
    report = max(val_batch(cohort).report, key=len)

    def views(epoch: int) -> list[str]:
        monkeypatch.setattr(DistillationTask, "current_epoch", epoch)
        return report_views([report] * 200, task.row_seeds(torch.arange(200), "view"), 0.6)

    assert views(0) == views(0) != views(1)
    whole = sum(view == report for view in views(0)) / 200
    assert 0.4 < whole < 0.75  # 0.4, and a quarter of the subsets is the whole report
    sentences = {sentence for view in views(0) for sentence in view.rstrip(".").split(". ")}
    assert sentences == set(report.rstrip(".").split(". "))


def test_queries_of_whole_reports_are_embedded_once(finished_run: Path, cohort: Path) -> None:
    task = task_of(finished_run)
    batch, seen = val_batch(cohort), []
    encode = task.teacher.encode_text
    task._queries.encoder = SimpleNamespace(  # type: ignore[assignment]
        to=lambda device: None, text_dim=task.teacher.text_dim, encode_text=lambda texts: (seen.extend(texts), encode(texts))[1]
    )  # fmt: skip
    views = [batch.report[0], *batch.report[1:-1], "No pneumothorax."]
    for _ in range(2):
        features = task._queries.embed(batch.row, batch.report, views)
        torch.testing.assert_close(features, encode(views))
    assert seen.count("No pneumothorax.") == 2
    assert all(seen.count(report) == 1 for report in views[:-1])


def labels_of(table: pd.DataFrame) -> list[frozenset[str]]:
    names = [name for name in table.columns if name.startswith("label:")]
    return [frozenset(name for name in names if float(row[name]) == 1) for _, row in table.iterrows()]


def test_the_oracle_takes_the_nearest_labels_and_the_shuffle_other_xrays(finished_run: Path, cohort: Path) -> None:
    store = XrayIndexArtefact.open(finished_run / "index/artefact")
    settings = NeighbourSettings(k=4, control="oracle", oracle_manifest=str(cohort / "xray.csv"))
    batch = val_batch(cohort, with_labels=True)
    module = data(cohort)
    oracle = OracleTeacher(store, settings, module.manifest.finding_names)
    assert batch.labels is not None
    positions = oracle.positions(batch.labels, batch.row.tolist())
    ct = labels_of(pd.read_csv(cohort / "ct.csv"))
    pool = labels_of(pd.read_csv(cohort / "xray.csv").iloc[store.items["row"]])
    for row, chosen in zip(batch.row.tolist(), positions.tolist(), strict=True):
        jaccard = [len(ct[row] & other) / len(ct[row] | other) if ct[row] | other else 1.0 for other in pool]
        assert len(set(chosen)) == 4
        assert sorted((jaccard[place] for place in chosen), reverse=True) == sorted(jaccard, reverse=True)[:4]
    expected = F.normalize(store.values(positions).mean(1), dim=-1)
    torch.testing.assert_close(oracle.targets(batch), expected)
    assert torch.equal(oracle.positions(batch.labels, batch.row.tolist()), positions)
    ties = oracle.positions(batch.labels[:1].repeat(3, 1), [0, 1, 2])
    assert len({tuple(row) for row in ties.tolist()}) > 1

    shuffled = task_of(finished_run, neighbours=NeighbourSettings(control="shuffled", control_seed=3))
    queries = shuffled.teacher.encode_text(batch.report)
    lookup = NeighbourLookup(store, 8, "mean", shuffle_seed=3)
    torch.testing.assert_close(shuffled._target(batch, batch.report), lookup.look_up(queries)["features"])
    plain = task_of(finished_run)._target(batch, batch.report)
    assert not torch.equal(shuffled._target(batch, batch.report), plain)


def test_the_oracle_needs_labels_and_the_index_s_own_manifest(finished_run: Path, cohort: Path, tmp_path: Path) -> None:
    own = NeighbourSettings(control="oracle", oracle_manifest=str(cohort / "xray.csv"))
    with pytest.raises(InputError, match=r"data\.init_args\.with_labels=true"):
        fit(task_of(finished_run, neighbours=own), data(cohort), tmp_path)
    fit(task_of(finished_run, neighbours=own), data(cohort, with_labels=True), tmp_path)
    other = NeighbourSettings(control="oracle", oracle_manifest=str(cohort / "ct.csv"))
    with pytest.raises(InputError, match=r"the manifest that the index .* was built from do not match"):
        fit(task_of(finished_run, neighbours=other), data(cohort, with_labels=True), tmp_path)
    with pytest.raises(InputError, match="oracle_manifest is not set"):
        NeighbourSettings(control="oracle")


def test_the_rerank_prefers_xrays_whose_findings_agree(finished_run: Path, cohort: Path) -> None:
    store = XrayIndexArtefact.open(finished_run / "index/artefact")
    assert store.findings is not None
    vocabulary = load_vocabulary(store.config["vocabulary"])
    task = task_of(finished_run, neighbours=NeighbourSettings(k=2, rerank=True), vocabulary=vocabulary.name)
    batch = val_batch(cohort)
    queries = task.teacher.encode_text(batch.report)
    said = [extract(report, vocabulary) for report in batch.report]
    asked = torch.tensor([[float(one.get(name, math.nan)) for name in store.finding_names] for one in said])

    def disagreement(lookup: NeighbourLookup, **given: Tensor) -> float:
        pool = store.findings[lookup.look_up(queries, **given)["positions"]]  # type: ignore[index]
        return float(((pool == 1) != (asked[:, None] == 1)).float().mean())

    assert disagreement(task.retrieved.lookup, findings=asked) < disagreement(NeighbourLookup(store, 2))
    expected = task.retrieved.lookup.look_up(queries, asked)["features"]
    torch.testing.assert_close(task._target(batch, batch.report), expected)


def test_anchors_lie_in_the_space_of_the_images(finished_run: Path, cohort: Path) -> None:
    batch = val_batch(cohort)
    task = task_of(finished_run, anchors="bank", bank_size=20)
    bank = task._anchors_of(batch, batch.report)
    assert bank is not None
    assert bank.shape == (20, task.store.value_dim)
    pool = {tuple(row) for row in F.normalize(task.store.features, dim=-1).tolist()}
    assert len(pool & {tuple(row) for row in bank.tolist()}) == 20
    again = task_of(finished_run, anchors="bank", bank_size=20)._anchors_of(batch, batch.report)
    assert again is not None
    assert torch.equal(bank, again)
    prompts = task_of(finished_run, anchors="prompts")._anchors_of(batch, batch.report)
    assert prompts is not None
    assert prompts.shape == (2 * len(load_vocabulary("phantom").names), task.store.value_dim)
    silent = SimpleNamespace(
        has_joint_space=False, has_text=False, name="DINO", text_dim=None, embed_dim=32, logit_scale=None
    )
    for kind in ("batch", "prompts"):
        with pytest.raises(InputError, match=r"DINO has no text tower.*anchors=bank"):
            Anchors(kind, silent, task.store, 20, "phantom")  # type: ignore[arg-type]
    Anchors("bank", silent, task.store, 20, "phantom")  # type: ignore[arg-type]


def test_tau_is_the_expert_s_own_or_must_be_named(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(finished_run)
    assert task.teacher.logit_scale is not None
    assert task.tau == pytest.approx(1 / task.teacher.logit_scale)
    assert task_of(finished_run, tau=0.05).tau == 0.05
    opened = distillation.open_teacher

    def without_temperature(*given: Any) -> Any:
        teacher, store = opened(*given)
        teacher.logit_scale = None
        return teacher, store

    monkeypatch.setattr(distillation, "open_teacher", without_temperature)
    with pytest.raises(InputError, match=r"the expert has no temperature; set --model\.init_args\.tau"):
        task_of(finished_run, anchors="bank")
    with pytest.raises(InputError, match=r"with no temperature.*anchors=bank"):
        task_of(finished_run, tau=0.1)
    assert task_of(finished_run, anchors="bank", tau=0.1).tau == 0.1
    assert task_of(finished_run, weights=DistillationWeights(relation=0.0)).anchors is None


def test_schedules_run_over_the_training_and_validation_takes_their_ends(
    finished_run: Path, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, float, float, float]] = []
    loss = distillation.distillation_loss

    def watched(student: Tensor, teacher: Tensor, anchors: Tensor, tau: float, weights: Any) -> Any:
        seen.append((student.requires_grad, tau, weights["pair"], weights["relation"]))
        return loss(student, teacher, anchors, tau, weights)

    monkeypatch.setattr(distillation, "distillation_loss", watched)
    task = task_of(finished_run, tau=0.4, schedule=DistillationSchedule(tau_end=0.1, relation_end=0.0))
    fit(task, data(cohort), tmp_path, epochs=3)
    steps = [entry[1:] for entry in seen if entry[0]]
    assert steps[0] == pytest.approx((0.4, 1.0, 1.0))
    assert steps[-1] == pytest.approx((0.1, 1.0, 0.0), abs=1e-9)
    ratios = [later[0] / earlier[0] for earlier, later in itertools.pairwise(steps)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    ends = [entry[1:] for entry in seen if not entry[0]]
    assert len(ends) >= 3
    assert all(end == pytest.approx((0.1, 1.0, 0.0)) for end in ends)


def test_nearly_uniform_targets_are_warned_about_once(finished_run: Path, cohort: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(task_of(finished_run, tau=5.0), data(cohort), tmp_path, epochs=2)
    told = [str(entry.message) for entry in caught if "nearly uniform" in str(entry.message)]
    assert len(told) == 1
    assert "at tau 5" in told[0]
    assert "Set a smaller model.init_args.tau" in told[0]
    assert float(trainer.callback_metrics["train/target_entropy"]) == pytest.approx(math.log(6), rel=0.02)


def index_of(folder: Path, expert: Any, keys: int, values: int) -> Path:
    draw = torch.Generator().manual_seed(0)
    names = [str(i) for i in range(30)]
    items = pd.DataFrame(dict.fromkeys(("study_id", "image_id", "patient_id"), names)).assign(row=range(30), split="train")  # fmt: skip
    write_index_artefact(
        folder, F.normalize(torch.randn(30, keys, generator=draw), dim=-1),
        F.normalize(torch.randn(30, values, generator=draw), dim=-1), items, {"xray-expert": expert.fingerprint()}, {},
    )  # fmt: skip
    return folder


def test_keys_and_values_may_differ_in_dimension(finished_run: Path, cohort: Path, tmp_path: Path) -> None:
    source = str(finished_run / "expert/artefact")
    expert = open_expert(source)
    wide = index_of(tmp_path / "wide", expert, keys=16, values=expert.embed_dim)
    task = DistillationTask(ResNet3D(variant="small"), source, str(wide), anchors="bank")
    assert (task.store.key_dim, task.store.value_dim) == (16, 32)
    assert (task.store.config["key_dim"], task.store.config["value_dim"]) == (16, 32)
    assert task.projection.config["out_dim"] == 32
    task._queries.encoder = SimpleNamespace(  # type: ignore[assignment]
        to=lambda device: None, text_dim=16, encode_text=lambda texts: F.normalize(torch.ones(len(texts), 16), dim=-1)
    )
    fit(task, data(cohort), tmp_path / "fit")
    other = index_of(tmp_path / "other", expert, keys=32, values=24)
    with pytest.raises(InputError, match=r"values of 24 dimensions and contains 24; the expert .* has 32"):
        DistillationTask(ResNet3D(variant="small"), source, str(other))
    same = XrayIndexArtefact.open(index_of(tmp_path / "same", expert, keys=16, values=24))
    assert len({task.store.fingerprint, same.fingerprint, XrayIndexArtefact.open(other).fingerprint}) == 3


def test_projections_must_be_computed_and_weights_make_sense(finished_run: Path, cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.init_args\.projection=true"):
        fit(task_of(finished_run, teachers=BOTH), data(cohort), tmp_path)
    with pytest.raises(InputError, match="at least one of them above 0"):
        TeacherSettings(retrieved=0.0)
    with pytest.raises(InputError, match=r"subset_share is 1\.5"):
        NeighbourSettings(subset_share=1.5)
    with pytest.raises(InputError, match="tau is 0"):
        task_of(finished_run, tau=0.0)
