"""Stages 2 and 3 on the device: under DDP, compiled and checkpointed, with lookups on the CPU, and how often the host waits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from host_waits import pretend_preset, waits_of_a_stage

from ctx_distill.cli import main
from ctx_distill.data.datamodules import CTDataModule
from ctx_distill.data.transforms import VolumeSpec
from ctx_distill.types import CTBatch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
VIT = "--model.init_args.encoder={class_path: ctx_distill.models.ct_encoder.ViT3D, init_args: {img_size: [24, 32, 32], variant: small}}"
WAITS = {
    "data.augment:_draws": "what is drawn on the CPU goes to the device",
    "retrieval.index:as_matrix": "FAISS on the CPU takes its queries from the host",
    "retrieval.index:XrayIndex.search": "what FAISS found goes to the device",
}
"""Functions in which a training step may make the host wait, and why."""


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
    more = ["--trainer.log_every_n_steps=1000", "--trainer.max_epochs=3", "--data.init_args.num_workers=0"]
    found, steps = waits_of_a_stage(stage(name, begun, cohort, preset, *more), device, monkeypatch)
    assert steps >= 3
    unnamed = {where: count / steps for where, count in found.items() if where not in WAITS}
    assert not unnamed, f"waits per step: {unnamed}"


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
