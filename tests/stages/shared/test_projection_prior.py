"""The projection as a prior: added after training, which it leaves alone; and the artefact stands alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.errors import InputError
from ctx_distill.models.ct_encoder import ResNet3D
from ctx_distill.models.dual_encoder import DualEncoder
from ctx_distill.models.opening import open_expert
from ctx_distill.stages.align.evidence import RobustSettings
from ctx_distill.stages.align.report_tower import TextSettings
from ctx_distill.stages.align.task import AlignmentTask
from ctx_distill.stages.distill.targets import embed_projection
from ctx_distill.stages.shared.projection_prior import PriorSettings, open_prior
from ctx_distill.stages.zero_shot.task import ZeroShotTask

pytestmark = pytest.mark.full
SPEC = VolumeSpec(spacing=(24.0, 24.0, 24.0), shape=(12, 16, 16))


def trained(run: Path, cohort: Path, folder: Path, rate: float, steps: int = 3, weight: float = 1.0) -> AlignmentTask:
    task = AlignmentTask(
        str(run / "expert/artefact"), str(run / "index/artefact"), TextSettings(trainable=False),
        encoder=ResNet3D("small", base_width=8), robust=RobustSettings(evidence=()), prior=PriorSettings(weight),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate),
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, max_steps=steps, logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    task.run(trainer, module(cohort), folder)
    return task


def module(cohort: Path, projection: bool = True) -> CTDataModule:
    return CTDataModule(str(cohort / "ct.csv"), SPEC, batch_size=4, text="required", projection=projection)


def test_it_leaves_training_alone_and_is_added_to_the_image_feature(
    finished_run: Path, cohort: Path, tmp_path: Path
) -> None:
    batch = next(iter(module(cohort).train_dataloader()))
    expected = embed_projection(batch, open_expert(str(finished_run / "expert/artefact")))
    torch.manual_seed(0)
    without = trained(finished_run, cohort, tmp_path / "without", rate=1e-2, weight=0.0).eval()
    torch.manual_seed(0)
    moved = trained(finished_run, cohort, tmp_path / "moved", rate=1e-2, weight=3.0).eval()
    for name, value in without.state_dict().items():
        assert torch.equal(moved.state_dict()[name], value), name
    own = without.predict_step(batch, 0)["image"]
    joint = own + 3.0 * expected
    torch.testing.assert_close(
        moved.predict_step(batch, 0)["image"], joint / joint.norm(dim=-1, keepdim=True), rtol=1e-5, atol=1e-6
    )
    assert not any("prior" in name or "visual" in name for name in moved.state_dict())

    artefact = tmp_path / "moved/artefact"
    away = artefact.rename(tmp_path / "away")
    model, read = DualEncoder.load(away)
    prior = open_prior(read, model.embed_dim)
    assert prior is not None
    with torch.no_grad():
        alone = model.encode_volume(batch.volume, prior.features(batch))[0]
    torch.testing.assert_close(alone, moved.predict_step(batch, 0)["image"])
    zero_shot = ZeroShotTask(str(away)).eval()
    torch.testing.assert_close(zero_shot.predict_step(batch, 0)["image"], alone)

    other = next((away / "prior_expert").glob("*.safetensors"))
    weights = away / "prior_expert"
    shutil.copytree(finished_run / "expert/artefact", tmp_path / "copy")
    assert open_expert(str(weights)).fingerprint() == open_expert(str(tmp_path / "copy")).fingerprint()
    content = bytearray(other.read_bytes())
    content[-1] ^= 1
    other.write_bytes(bytes(content))
    with pytest.raises(InputError, match="was trained with"):
        open_prior(read, model.embed_dim)


def test_the_feature_is_the_sum_by_hand() -> None:
    torch.manual_seed(1)

    class Text(torch.nn.Module):
        embed_dim = 6

    model = DualEncoder(ResNet3D("small", base_width=8), Text(), prior_weight=2.0)  # type: ignore[arg-type]
    volume, prior = torch.randn(2, 1, 16, 16, 16), F.normalize(torch.randn(2, 6), dim=-1)
    image, output = model.encode_volume(volume, prior)
    own = output.pooled @ model.image_projection.net.weight.T + model.image_projection.net.bias
    raw = own / own.norm(dim=-1, keepdim=True) + 2.0 * prior
    torch.testing.assert_close(image, raw / raw.norm(dim=-1, keepdim=True))
    with pytest.raises(InputError, match=r"data\.init_args\.projection=true"):
        model.encode_volume(volume)


def test_refusals(finished_run: Path, cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 or more"):
        PriorSettings(-1.0)
    expert, index = str(finished_run / "expert/artefact"), str(finished_run / "index/artefact")
    narrow = AlignmentTask(
        expert, index, TextSettings(projection_dim=8), encoder=ResNet3D("small", base_width=8), prior=PriorSettings(1.0)
    )
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(InputError, match="Use the expert's space"):
        narrow.run(trainer, module(cohort), tmp_path)
