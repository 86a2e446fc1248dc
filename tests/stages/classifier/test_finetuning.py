"""Fine-tuning: rates by layer, early stopping, and a whole run of it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from ctx_distill.commands.main import main
from ctx_distill.errors import InputError
from ctx_distill.models.ct_encoder import CTEncoder, ResNet3D, ViT3D
from ctx_distill.stages.classifier.loss import LossSettings
from ctx_distill.stages.classifier.task import ClassifierTask
from ctx_distill.training.layer_decay import layer_groups


def rates(encoder: CTEncoder, decay: float) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    groups = layer_groups(encoder, decay)
    found = [(names[id(p)], group["lr_factor"]) for group in groups for p in group["params"]]
    assert len(found) == len(names)  # each once
    return dict(found)


def test_rates_of_a_resnet_by_hand() -> None:
    found = rates(ResNet3D("small", base_width=8), 0.5)  # stem and four blocks
    assert {rate for name, rate in found.items() if name.startswith("stem.")} == {1 / 32}
    for stage, rate in enumerate([1 / 16, 1 / 8, 1 / 4, 1 / 2]):
        assert {r for name, r in found.items() if name.startswith(f"stages.{stage}.")} == {rate}


def test_rates_of_a_vit_by_hand() -> None:
    found = rates(ViT3D((16, 16, 16), (8, 8, 8)), 0.8)  # embedding and four blocks
    assert {rate for name, rate in found.items() if name.startswith("patch_embedding")} == {0.8**5}
    assert {rate for name, rate in found.items() if name.startswith(("blocks.3", "norm"))} == {0.8}


def test_vectors_do_not_decay_in_weight() -> None:
    for group in layer_groups(ResNet3D("small", base_width=8), 0.7):
        assert (group.get("weight_decay") == 0.0) == all(p.ndim <= 1 for p in group["params"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": "linear", "layer_decay": 0.7}, "mode=finetune"),
        ({"mode": "linear", "loss": LossSettings(mixup=0.2)}, "mode=finetune"),
        ({"mode": "finetune", "layer_decay": 1.5}, "layer_decay is 1.5"),
        ({"mode": "finetune", "patience": 0}, "patience 0"),
    ],
)
def test_settings_that_do_not_go_together(finished_run: Path, settings: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ClassifierTask(str(finished_run / "align" / "artefact"), **settings)  # type: ignore[arg-type]


@pytest.mark.full
def test_a_run_of_all_of_it(finished_run: Path, cohort: Path, tiny_preset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for stage in ("expert", "index", "distill", "align"):
        shutil.copytree(finished_run / stage, run / stage)
    shutil.copy(finished_run / "run.json", run / "run.json")
    arguments = ["classifier", "--data", str(cohort), "--run", str(run), "--preset", str(tiny_preset)]
    arguments += [
        "--model.init_args.mode=finetune", "--model.init_args.layer_decay=0.7", "--model.init_args.patience=1",
        "--model.init_args.loss.kind=focal", "--model.init_args.loss.mixup=0.4", "--trainer.max_epochs=12",
        # so large a rate makes the loss of `val` grow
        "--model.init_args.optimizer={class_path: torch.optim.SGD, init_args: {lr: 30.0}}",
    ]  # fmt: skip
    assert main(arguments) == 0
    rows = list(csv.DictReader((run / "classifier" / "logs" / "metrics.csv").open()))
    losses = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert len(losses) < 12
    assert losses[-1] >= min(losses[:-1])  # it stopped since the last was no better
    metrics = json.loads((run / "classifier" / "metrics.json").read_text())
    assert metrics["findings_scored"] > 0
    import ctx_distill

    model = ctx_distill.load(run / "classifier")  # a fine-tuned encoder stands by itself
    one = model.predict(sorted(cohort.glob("ct/*.nii.gz"))[0], saliency=[model.findings[0]])
    assert one.embedding.shape == (model.parts.classifier.encoder.embed_dim,)  # type: ignore[union-attr]
    assert torch.isfinite(torch.tensor(list(one.probabilities.values()))).all()
