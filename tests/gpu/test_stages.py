"""Stages 2 and 3 on the device: under DDP, compiled and checkpointed, with lookups on the CPU, and how often the host waits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from host_waits import pretend_preset, waits_in_a_process, waits_of_a_stage

from ctx_distill.commands.main import main
from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.types import CTBatch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
VIT = "--model.init_args.encoder={class_path: ctx_distill.models.ct_encoder.ViT3D, init_args: {img_size: [24, 32, 32], variant: small}}"
WAITS = {
    "data.transforms.augment:_draws": "what is drawn on the CPU goes to the device",
    "models.experts.open_clip_text:OpenClipTextTower.tokenize": "token ids go to the device",
    "models.text_tower:TextTower.encode_reports": "which chunks are whose goes to the device",
    "retrieval.index:as_matrix": "FAISS on the CPU takes its queries from the host",
    "retrieval.index:XrayIndex.search": "what FAISS found goes to the device",
    "retrieval.keys:make_queries": "the centre of the queries goes to the device",
    "retrieval.lookup:NeighbourLookup._rerank": "findings of the pool are on the host",
    "retrieval.store:XrayIndexArtefact.values": "values of the pool are on the host",
    "training.row_features:RowFeatures._find": "what a frozen tower made of a row is kept on the host",
    "training.row_features:ReportFeatures.embed.<locals>.put": "features from the host",
    "training.row_features:ReportFeatures.embed": "the rows' numbers",
    "stages.distill.targets:RetrievedTeacher._live": "which reports have text",
    "stages.distill.task:DistillationTask._terms": "the rows' numbers",
    "stages.distill.task:DistillationTask.on_train_batch_end": "timings go to the device to be averaged",
    "stages.distill.task:DistillationTask._warn_of_uniform_targets": "once per epoch, until it has warned",
    "training.base_task:TrainedTask.on_train_batch_start": "the rows' numbers",
    "training.base_task:TrainedTask.row_seeds": "the rows' numbers",
    "training.base_task:TrainedTask.gather_once": "a row that a sampler repeated counts once",
    "stages.align.task:AlignmentTask._views": "the rows' numbers",
    "stages.align.training_reports:TrainingReports.places": "the rows' numbers",
    "stages.align.training_reports:TrainingReports.places.<locals>.<listcomp>": "the rows' numbers",
    "stages.align.evidence:FalseNegatives.features": "evidence of the training rows is on the host",
    "stages.align.evidence:FalseNegatives.features.<locals>.<dictcomp>": "evidence of the training rows is on the host",
    "losses.false_negatives:findings_evidence": "equal rows are grouped",
    "stages.align.corrected_pairs:CorrectedPairs.observe": "the record is on the host",
    "stages.align.corrected_pairs:CorrectedPairs.observe.<locals>.<dictcomp>": "the record is on the host",
    "stages.align.corrected_pairs:CorrectedPairs._select": "which pairs the record may keep",
    "stages.align.corrected_pairs:_label_agreement": "the record is on the host",
}
"""Functions of the package in which a training step makes the host wait for the device, and what for. None is a callback: a
guard or a watchdog that waits costs every stage its head start over the device."""

PRETENDED = {
    "training.callbacks.loss_guard:LossGuard.on_before_optimizer_step": "no fused optimizer, which skips a step by itself"
}
"""Those of the pretended device alone."""


def stage(name: str, run: Path, cohort: Path, preset: Path, *more: str) -> list[str]:
    return [name, "--data", str(cohort), "--run", str(run), "--preset", str(preset), "--force", *more]


@pytest.fixture
def begun(finished_run: Path, device: torch.device, tmp_path: Path) -> Path:
    """A run whose expert and index are there, made on the CPU; its other stages are run again."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    return run


def steps_of(run: Path, name: str) -> int:
    training = json.loads((run / name / "training.json").read_text())
    assert training["skipped_steps"] == 0
    return int(training["steps"])


def test_two_stages_under_ddp(begun: Path, cohort: Path, bf16_preset: Path, backend: str, device: torch.device) -> None:
    """One rank in a process group of NCCL: DDP's buckets, the samplers, the barriers and broadcasts of Lightning."""
    if device.type == "cuda":
        assert torch.distributed.is_nccl_available()
    strategy = (
        "--trainer.strategy={class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {process_group_backend: "
        f"{backend}, find_unused_parameters: true}}}}"
    )
    evidence = (
        "--model.init_args.robust={evidence: [report, findings, retrieved, ema], mode: relabel, warmup_epochs: 1}"
    )
    try:
        assert main(stage("distill", begun, cohort, bf16_preset, strategy)) == 0
        assert main(stage("align", begun, cohort, bf16_preset, strategy, evidence)) == 0
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert steps_of(begun, "distill") == steps_of(begun, "align") > 0


@pytest.mark.parametrize("encoder", ["resnet", "vit"])
def test_a_stage_compiled_checkpointed_and_in_bf16(
    encoder: str, begun: Path, cohort: Path, bf16_preset: Path, tmp_path: Path
) -> None:
    compute = "--model.init_args.compute={compile: true, checkpointing: true}"
    more = [compute, "--model.init_args.neighbours.device=cpu", *([VIT] if encoder == "vit" else [])]
    assert main(stage("distill", begun, cohort, bf16_preset, *more)) == 0
    assert steps_of(begun, "distill") > 0


def test_micro_batches_wait_on_the_host(begun: Path, cohort: Path, bf16_preset: Path) -> None:
    more = ["--model.init_args.micro_batch=3", "--model.init_args.storage=float16"]
    assert main(stage("align", begun, cohort, bf16_preset, *more)) == 0
    assert steps_of(begun, "align") > 0


def test_a_fine_tuned_classifier(begun: Path, cohort: Path, bf16_preset: Path) -> None:
    assert main(stage("classifier", begun, cohort, bf16_preset, "--model.init_args.mode=finetune")) == 0
    assert steps_of(begun, "classifier") > 0


@pytest.mark.parametrize("name", ["distill", "align"])
def test_the_host_waits_in_named_places_alone(
    name: str,
    begun: Path,
    cohort: Path,
    bf16_preset: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    preset = bf16_preset if device.type == "cuda" else pretend_preset(bf16_preset, tmp_path)
    more = ["--trainer.log_every_n_steps=1000", "--trainer.max_epochs=5", "--data.init_args.num_workers=0"]
    arguments = stage(name, begun, cohort, preset, *more)
    on_gpu = device.type == "cuda"
    found, steps = waits_of_a_stage(arguments, device, monkeypatch) if on_gpu else waits_in_a_process(arguments)
    assert steps >= 3
    own = {where: count / steps for where, count in found.items() if not where.startswith("(")}
    named = WAITS if device.type == "cuda" else WAITS | PRETENDED
    unnamed = {where: count for where, count in own.items() if where not in named}
    assert not unnamed, f"waits per step: {unnamed}; all of them: {own}"


def test_batches_are_pinned_and_copied_without_waiting(
    cohort: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = CTDataModule(
        str(cohort / "ct.csv"), VolumeSpec(spacing=(24.0, 24.0, 24.0), shape=(12, 16, 16)), batch_size=4
    )
    batch = next(iter(module.loader(module.manifest.split("val"))))
    assert isinstance(batch, CTBatch)
    assert batch.volume.is_pinned() == (device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            moved = batch.volume.to(device, non_blocking=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert torch.equal(moved.cpu(), batch.volume)
