"""The stages on a device that refuses the CPU's tensors (`helpers/pretend_device.py`): what would fail on a GPU fails here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from host_waits import pretend_preset
from pretend_device import AVAILABLE, NAME, PretendDevice, register
from torch import nn

from ctx_distill.commands.main import main
from ctx_distill.runs.stage_table import STAGES

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this torch has no devices that are written in Python")
if AVAILABLE:
    register()  # before the first backward pass of this process, which may be that of a fixture
AUGMENTED = "{shift: 0.05, scale: 0.05, rotate: 5, contrast: 0.05, brightness: 0.05, noise: 0.02}"
VARIANTS = {
    "distill-sampled": [
        "distill", "--model.init_args.anchors=batch", f"--model.init_args.augmentation={AUGMENTED}",
        "--model.init_args.neighbours={mode: sample, subset_share: 0.5}",
    ],
    "distill-static": [
        "distill", "--model.init_args.anchors=bank", "--model.init_args.compute.checkpointing=true",
        "--model.init_args.neighbours={mode: softmax, lookup: static, control: shuffled}",
    ],
    "distill-projection": [
        "distill", "--model.init_args.teachers={retrieved: 1.0, projection: 1.0}", "--data.init_args.projection=true",
        "--model.init_args.schedule={tau_end: 0.05, pair_end: 0.5, relation_end: 0.1}", "--model.init_args.select=best",
    ],
    "align-evidence": [
        "align", "--model.init_args.robust={evidence: [report, findings, retrieved, ema], mode: soft, warmup_epochs: 1}",
        "--model.init_args.text={tower: expert, trainable: true}", "--model.init_args.keep={weight: 0.5, projection: 0.5}",
    ],
    "align-masking": [
        "align", "--model.init_args.micro_batch=4", "--model.init_args.storage=float16", "--model.init_args.chunk=4",
        "--model.init_args.masking={weight: 0.1, vocabulary: phantom}", "--model.init_args.robust.evidence=[]",
        "--model.init_args.text={tower: scratch, trainable: true}", "--model.init_args.prior.weight=0",
    ],
    "align-siglip": [
        "align", "--model.init_args.objective=siglip", "--model.init_args.robust.evidence=[]",
        "--trainer.accumulate_grad_batches=2",
    ],
    "align-soft-targets": [
        "align", "--model.init_args.objective=soft-targets", "--model.init_args.robust.evidence=[]",
    ],
    "classifier-finetune": ["classifier", "--model.init_args.mode=finetune"],
}  # fmt: skip


@pytest.fixture
def pretended() -> Iterator[PretendDevice]:
    with PretendDevice() as mode:
        yield mode


def test_the_device_refuses_what_a_gpu_refuses(pretended: PretendDevice) -> None:
    x = torch.arange(6.0).reshape(2, 3).to(NAME)
    assert x.device.type == NAME
    assert x.cpu().device.type == "cpu"
    refused = (
        lambda: x + torch.ones(2, 1),
        lambda: torch.ones(6)[x[0].long()],
        lambda: torch.cat([x, torch.ones(1, 3)]),
        lambda: x.normal_(generator=torch.Generator().manual_seed(0)),
    )
    for mix in refused:
        with pytest.raises(RuntimeError, match="expected"):
            mix()
    with pytest.raises((TypeError, RuntimeError)):
        x.numpy()
    assert (x + torch.tensor(1.0))[1].tolist() == [4, 5, 6]
    assert x.normal_(generator=torch.Generator(x.device).manual_seed(0)).device.type == NAME


def test_the_device_learns_as_the_cpu_does(pretended: PretendDevice) -> None:
    gradients = []
    for place in ("cpu", NAME):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv3d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(32, 2)).to(place)
        loss = net(torch.randn(3, 1, 4, 4, 4).to(place)).square().mean()
        loss.backward()
        optimizer = torch.optim.AdamW(net.parameters())
        optimizer.step()
        gradients.append(torch.cat([p.detach().flatten().cpu() for p in net.parameters()]))
    assert torch.equal(gradients[0], gradients[1])


def test_waits_are_counted(pretended: PretendDevice) -> None:
    x = torch.ones(3).to(NAME, non_blocking=True)
    assert not pretended.syncs
    float(x.sum())
    x[x > 0]
    x.tolist()
    assert sum(pretended.syncs.values()) == 3


@pytest.mark.slow
def test_the_whole_pipeline_gives_the_cpu_s_predictions(
    finished_run: Path, cohort: Path, tiny_preset: Path, tmp_path: Path
) -> None:
    preset, run = pretend_preset(tiny_preset, tmp_path), tmp_path / "run"
    with PretendDevice():
        assert main(["all", "--data", str(cohort), "--run", str(run), "--preset", str(preset)]) == 0
    for stage in STAGES.values():
        assert (run / stage.folder / "metrics.json").is_file(), stage.name
    # Losses of a stage on the same inputs agree to 3e-7. Adam's first steps turn that into whole steps of weights whose
    # gradient is near 0, three stages in a row: .0011 was seen.
    for table in ("zero_shot_predictions.csv", "classifier/predictions.csv", "index/retrieval.csv"):
        found, expected = (pd.read_csv(root / table).select_dtypes("number") for root in (run, finished_run))
        np.testing.assert_allclose(found.to_numpy(), expected.to_numpy(), rtol=0, atol=5e-3, err_msg=table)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_variant_mixes_no_devices(
    name: str, finished_run: Path, cohort: Path, tiny_preset: Path, tmp_path: Path
) -> None:
    preset, run = pretend_preset(tiny_preset, tmp_path), tmp_path / "run"
    shutil.copytree(finished_run, run)
    stage, *more = VARIANTS[name]
    with PretendDevice():
        assert main([stage, "--data", str(cohort), "--run", str(run), "--preset", str(preset), "--force", *more]) == 0


@pytest.mark.slow
def test_a_finished_model_predicts_there(finished_run: Path, cohort: Path) -> None:
    from ctx_distill.inference.model import CTModel
    from ctx_distill.inference.parts import open_parts

    scan = cohort / pd.read_csv(cohort / "ct.csv")["image_path"][0]
    expected = CTModel(open_parts(finished_run)).predict(scan, saliency=True, report=True)
    with PretendDevice():
        found = CTModel(open_parts(finished_run)).to(NAME).predict(scan, saliency=True, report=True)
    assert found.report == expected.report
    assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-6)
    for name, saliency in expected.saliency.items():
        np.testing.assert_allclose(found.saliency[name].values, saliency.values, atol=1e-5)
