"""Stage 4's heads stopped by a signal and gone on with: a decoder with LoRA on a Hugging Face model, and early stopping."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import ctx_distill
from ctx_distill.commands.main import main
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.models.decoder_artefact import load_decoder
from ctx_distill.signals import STOPPED
from ctx_distill.stages.classifier.task import ClassifierTask
from ctx_distill.stages.report.task import ReportTask
from ctx_distill.text.tokenizer import train_wordpiece
from ctx_distill.training.base_task import TrainedTask

pytestmark = pytest.mark.full
Stage = Callable[..., Path]


@pytest.fixture
def stage(
    finished_run: Path, cohort: Path, tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Stage:
    """Run a stage in a folder of its own; with `stop`, by a signal after so many training steps first."""

    def run(name: str, task: type[TrainedTask], arguments: list[str], folder: str, stop: int | None = None) -> Path:
        place = tmp_path / folder
        for made in ("expert", "index", "distill", "align"):
            shutil.copytree(finished_run / made, place / made)
        shutil.copy(finished_run / "run.json", place / "run.json")
        command = [name, "--data", str(cohort), "--run", str(place), "--preset", str(tiny_preset), *arguments]
        if stop is not None:
            steps: list[int] = []
            real = task.training_step

            def counted(self: Any, batch: Any, batch_idx: int) -> Any:
                steps.append(batch_idx)
                if len(steps) == stop:
                    os.kill(os.getpid(), signal.SIGUSR1)
                return real(self, batch, batch_idx)

            with monkeypatch.context() as patch:
                patch.setattr(task, "training_step", counted)
                assert main(command) == STOPPED
            assert len(steps) == stop
        assert main(command) == 0
        return place

    return run


def same_weights(one: Path, two: Path) -> None:
    first, second = (load_file(place / "artefact" / "model.safetensors") for place in (one, two))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture(scope="module")
def language_model(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights and a licence, as the hub would hold it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    place = tmp_path_factory.mktemp("hub") / "tiny-llama"
    manifest = read_manifest(cohort / "ct.csv").split("train")
    words = len(train_wordpiece([manifest.report(row) for row in manifest.frame.index], 300, place, 160))
    torch.manual_seed(3)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=words, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256)
    ).save_pretrained(place)  # fmt: skip
    (place / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    return place


def test_lora_on_a_language_model_through_the_whole_stage(
    stage: Stage, language_model: Path, cohort: Path, tmp_path: Path
) -> None:
    arguments = [
        f"--model.init_args.source={language_model}", "--model.init_args.lora={rank: 4, dropout: 0.1}",
        "--model.init_args.max_length=24", "--model.init_args.min_length=6", "--model.init_args.beams=2",
        "--model.init_args.length_penalty=0.5", "--trainer.max_epochs=3",
    ]  # fmt: skip
    whole = stage("report", ReportTask, arguments, "whole")
    stopped = stage("report", ReportTask, arguments, "stopped", stop=3)
    same_weights(whole / "report", stopped / "report")
    assert (whole / "report" / "reports.csv").read_bytes() == (stopped / "report" / "reports.csv").read_bytes()
    saved = load_file(whole / "report" / "artefact" / "model.safetensors")
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in saved.items())  # they begin as 0
    assert not any("base_layer" in name or "embed_tokens" in name for name in saved)

    table = pd.read_csv(whole / "report" / "reports.csv", keep_default_na=False).set_index("study_id")
    model = ctx_distill.load(whole)
    assert model.parts.decoder is not None
    again, _ = load_decoder(whole / "report" / "artefact")
    manifest = read_manifest(cohort / "ct.csv").split("test")
    assert table["generated"].str.len().max() > 0
    for row in manifest.frame.index[:2]:
        found = model.predict(manifest.image_file(row), report=True)
        assert found.report == table.at[manifest.frame.at[row, "study_id"], "generated"]
    tokens = torch.randn(2, again.num_tokens, again.token_dim, generator=torch.Generator().manual_seed(0))
    assert again.generate(tokens, 8) == model.parts.decoder.model.generate(tokens, 8)

    assert main(["export", str(whole), str(tmp_path / "export")]) == 0
    card = (tmp_path / "export" / "README.md").read_text()
    base = json.loads((whole / "report" / "artefact" / "decoder" / "base.json").read_text())
    assert (
        f"base model of the report decoder (tiny-llama, weights {base['hash'][:12]}, not included) | apache-2.0 |"
        in card
    )
    assert str(language_model) not in card
    exported = ctx_distill.load(tmp_path / "export").predict(manifest.image_file(row), report=True)
    assert exported.report == found.report


def test_patience_survives_a_stop(stage: Stage) -> None:
    """The loss of `val` grows from the second epoch on: the stop falls where two of three epochs of patience are spent."""
    arguments = [
        "--model.init_args.mode=finetune", "--model.init_args.patience=3", "--model.init_args.loss.kind=focal",
        "--model.init_args.loss.mixup=0.4", "--trainer.max_epochs=12",
        "--model.init_args.optimizer={class_path: torch.optim.SGD, init_args: {lr: 30.0}}",
    ]  # fmt: skip

    def losses(run: Path) -> list[float]:
        rows = csv.DictReader((run / "classifier" / "logs" / "metrics.csv").open())
        return [float(row["val/loss"]) for row in rows if row["val/loss"]]

    whole = stage("classifier", ClassifierTask, arguments, "whole")
    epochs = losses(whole)
    best = epochs.index(min(epochs))
    assert len(epochs) == best + 4 < 12  # stopped by patience
    steps = json.loads((whole / "classifier" / "training.json").read_text())["steps"] // len(epochs)
    stopped = stage("classifier", ClassifierTask, arguments, "stopped", stop=(best + 3) * steps + 1)
    assert losses(stopped) == epochs
    same_weights(whole / "classifier", stopped / "classifier")
