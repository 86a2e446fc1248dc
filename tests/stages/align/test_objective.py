"""Stage 3's objectives and what stands beside them, under a real trainer: checkpoint, artefact, resume, two ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.nn import functional as F

from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.distributed import rank, world_size
from ctx_distill.errors import InputError
from ctx_distill.losses.siglip import INIT_LOGIT_SCALE
from ctx_distill.models.dual_encoder import DualEncoder
from ctx_distill.stages.align.distillation_regulariser import DistillationRegulariser, DistillationRegulariserSettings
from ctx_distill.stages.align.evidence import RobustSettings
from ctx_distill.stages.align.objective import SoftTargetSettings, check_objective, soft_target_temperature
from ctx_distill.stages.align.report_tower import TextSettings
from ctx_distill.stages.align.task import AlignmentTask
from ctx_distill.types import CTBatch

VOLUME = VolumeSpec(spacing=(12.0, 12.0, 12.0), shape=(24, 32, 32), window=(-1000.0, 600.0))


def test_corrections_beside_another_objective_are_refused() -> None:
    for objective in ("siglip", "soft-targets"):
        check_objective(objective, RobustSettings(evidence=()))  # type: ignore[arg-type]
        with pytest.raises(InputError, match=rf"objective is {objective}, but robust.evidence is \[report\].*Set robust"
                                             r"\.evidence=\[\]"):  # fmt: skip
            check_objective(objective, RobustSettings())  # type: ignore[arg-type]
    check_objective("infonce", RobustSettings())


def test_soft_targets_take_the_expert_s_own_temperature() -> None:
    expert: Any = SimpleNamespace(name="x", logit_scale=20.0)
    assert soft_target_temperature(SoftTargetSettings(), expert) == 0.05
    assert soft_target_temperature(SoftTargetSettings(temperature=0.3), expert) == 0.3
    with pytest.raises(InputError, match=r"soft_targets.temperature=0.05"):
        soft_target_temperature(SoftTargetSettings(), SimpleNamespace(name="x", logit_scale=None))  # type: ignore[arg-type]
    for bad in (SoftTargetSettings(weight=1.5), SoftTargetSettings(temperature=0.0)):
        with pytest.raises(InputError, match="expected a weight from 0 to 1"):
            soft_target_temperature(bad, expert)


class Pool:
    """Stands in for an X-ray index of four items whose first two are nearest to everything."""

    value_dim = 3
    features = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]), dim=-1)

    def __len__(self) -> int:
        return 4

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(len(queries), k), torch.arange(k).expand(len(queries), k)

    def values(self, positions: torch.Tensor) -> torch.Tensor:
        return self.features[positions]


def test_what_is_kept_is_the_mean_of_the_neighbours_and_the_projection() -> None:
    seen: list[int] = []

    def encode_image(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return F.normalize(pixels[:, 0, :3], dim=-1)

    store: Any = Pool()
    reports: Any = SimpleNamespace(
        retrieved=lambda lookup: lookup.look_up(torch.ones(5, 2))["features"],
        places=lambda rows: rows - 10,
        expert=SimpleNamespace(encode_image=encode_image, preprocess_batch=lambda images: images),
    )
    batch = CTBatch(torch.zeros(2, 1, 1, 1, 1), torch.arange(2), torch.tensor([11, 13]), ["a", "b"])
    half = np.sqrt(0.5)
    plain = DistillationRegulariser(DistillationRegulariserSettings(1.0, 0.0, 2), reports, store, 3)
    np.testing.assert_allclose(plain.targets(batch), [[half, half, 0]] * 2, atol=1e-6)
    mixed = DistillationRegulariser(DistillationRegulariserSettings(1.0, 0.5, 2), reports, store, 3)
    with pytest.raises(InputError, match=r"projection=true"):
        mixed.targets(batch)
    batch.projection = torch.tensor([[[0.0, 0.0, 1.0]], [[1.0, 1.0, 0.0]]])
    expected = np.array([[half, half, 0.5], [half * 1.5, half * 1.5, 0]])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    for _ in range(2):
        np.testing.assert_allclose(mixed.targets(batch), expected, atol=1e-6)
    assert seen == [1, 1]  # a row is embedded once, by itself
    with pytest.raises(InputError, match=r"joint space has 4 dimensions and the expert's image space has 3"):
        DistillationRegulariser(DistillationRegulariserSettings(1.0), reports, store, 4)


EVERYTHING: dict[str, Any] = {
    # Continuous evidence alone: among pairs equally strong (findings) the order of the columns decides, and ranks differ.
    "robust": {"evidence": ["report", "ema"], "quantile": 0.8, "mode": "soft"},
    "keep": {"weight": 0.5},
}
SIGLIP: dict[str, Any] = {"objective": "siglip", "robust": {"evidence": []}}


def train(run: str, cohort: str, folder: str, given: dict[str, Any], epochs: int, batch: int) -> dict[str, Any]:
    """What a stage in float64 leaves, on this process's ranks; it resumes where the folder has a checkpoint."""
    root, world = Path(run), world_size()
    L.seed_everything(3)
    task = AlignmentTask(
        expert=str(root / "expert" / "artefact"), index=str(root / "index" / "artefact"),
        student=str(root / "distill" / "artefact"), objective=given.get("objective", "infonce"),
        text=TextSettings(tower="scratch", width=32, layers=1, vocab_size=300, context_length=64),
        robust=RobustSettings(**given["robust"]), keep=DistillationRegulariserSettings(**given.get("keep", {})),
        optimizer=partial(torch.optim.SGD, lr=0.02, momentum=0.9),
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1000),
    )  # fmt: skip
    data = CTDataModule(f"{cohort}/ct.csv", VOLUME, batch_size=batch, text="required", with_labels=True)
    strategy: Any = SingleDeviceStrategy("cpu")
    if world > 1:
        os.environ["LOCAL_RANK"] = str(rank())
        environment = LightningEnvironment()
        environment.set_world_size(world)
        strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=environment)
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, precision="64-true", max_epochs=epochs, logger=False,
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    metrics = task.run(trainer, data, Path(folder))
    return {
        "weights": {name: value.double() for name, value in task.state_dict().items()},
        "metrics": {name: value for name, value in metrics.items() if isinstance(value, (int, float))},
        "thresholds": metrics.get("thresholds", {}),
        "optimised": [p.shape.numel() for group in trainer.optimizers[0].param_groups for p in group["params"]],
        "learnt": sum(p.numel() for p in task.parameters() if p.requires_grad),
    }


def checkpoint_of(folder: Path) -> dict[str, torch.Tensor]:
    loaded = torch.load(folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    state: dict[str, torch.Tensor] = loaded["state_dict"]
    return state


def assert_same(result: dict[str, Any], expected: dict[str, Any], names: Sequence[str], atol: float) -> None:
    assert result["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], value, rtol=0, atol=atol)
    for name in names:
        assert result["metrics"][f"train_{name}"] == pytest.approx(expected["metrics"][f"train_{name}"], abs=1e-6), name


@pytest.mark.full
def test_siglip_s_bias_is_learnt_and_saved_and_stays_out_of_the_artefact(
    finished_run: Path, cohort: Path, tmp_path: Path
) -> None:
    result = train(str(finished_run), str(cohort), str(tmp_path), SIGLIP, epochs=1, batch=6)
    bias = checkpoint_of(tmp_path)["logit_bias"]
    assert float(bias) == float(result["weights"]["logit_bias"]) != -10.0
    assert sum(result["optimised"]) == result["learnt"]
    model, _ = DualEncoder.load(tmp_path / "artefact")
    assert not any("bias" in name and model.state_dict()[name].ndim == 0 for name in model.state_dict())
    assert float(model.logit_scale.detach().exp()) == pytest.approx(INIT_LOGIT_SCALE, abs=2)


@pytest.mark.full
def test_a_resumed_run_goes_on_with_its_moving_average_and_threshold(
    finished_run: Path, cohort: Path, tmp_path: Path
) -> None:
    given = (str(finished_run), str(cohort))
    expected = train(*given, str(tmp_path / "whole"), EVERYTHING, epochs=3, batch=6)
    train(*given, str(tmp_path / "parts"), EVERYTHING, epochs=2, batch=6)
    half = checkpoint_of(tmp_path / "parts")
    assert torch.isfinite(half["moving_average.threshold"])
    inner = {name for name in half if name.startswith("moving_average.module.")}
    assert any(not torch.equal(half[name], half[name.replace("moving_average.module", "model")]) for name in inner)
    result = train(*given, str(tmp_path / "parts"), EVERYTHING, epochs=3, batch=6)
    assert_same(result, expected, ("loss", "keep", "corrected_pairs"), atol=1e-6)
    assert result["thresholds"] == pytest.approx(expected["thresholds"], abs=1e-6)
    assert expected["metrics"]["train_corrected_pairs"] > 0
    # Neither in the optimizer nor in the artefact.
    assert sum(expected["optimised"]) == expected["learnt"]
    model, _ = DualEncoder.load(tmp_path / "whole" / "artefact")
    assert {f"model.{name}" for name in model.state_dict()} == {name for name in half if name.startswith("model.")}


@pytest.mark.full
@pytest.mark.ddp
@pytest.mark.parametrize("given", [EVERYTHING, SIGLIP], ids=["everything", "siglip"])
def test_two_ranks_train_the_weights_of_one(
    finished_run: Path, cohort: Path, tmp_path: Path, pool: Callable[[int], Any], given: dict[str, Any]
) -> None:
    # All 14 training rows in each step: Lightning's sampler of two ranks deals out other batches than one rank's.
    arguments = {"run": str(finished_run), "cohort": str(cohort), "given": given, "epochs": 2}
    expected = train(**arguments, folder=str(tmp_path / "one"), batch=14)  # type: ignore[arg-type]
    names = ["loss", "keep", "suspected_pairs", "corrected_pairs", "false_negative_precision"]
    for result in pool(2).run(__file__, "train", {**arguments, "folder": str(tmp_path / "two"), "batch": 7}):
        assert_same(result, expected, names if given is EVERYTHING else ["loss"], atol=1e-7)
