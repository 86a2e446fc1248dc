"""Entity-focused masking in stage 3: draws, refusals, what learns from it, resume, micro-batches, two ranks."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from ctx_distill.checkpoint import read_artefact
from ctx_distill.commands.main import main
from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.distributed import rank, world_size
from ctx_distill.errors import InputError
from ctx_distill.models.ct_encoder import ResNet3D
from ctx_distill.models.dual_encoder import DualEncoder
from ctx_distill.models.experts.open_clip_expert import make_expert_folder
from ctx_distill.models.text_encoder import BertTextEncoder, ExpertTextEncoder
from ctx_distill.stages.align.entity_masking import EntityMasking, MaskingSettings
from ctx_distill.stages.align.masked_language_loss import masked_language_loss
from ctx_distill.stages.align.report_tower import TextSettings
from ctx_distill.stages.align.task import AlignmentTask

VOLUME = VolumeSpec(spacing=(12.0, 12.0, 12.0), shape=(24, 32, 32), window=(-1000.0, 600.0))
FINDINGS = ["pleural effusion", "consolidation", "emphysema", "atelectasis"]
REPORTS = [f"{start} {finding}." for finding in FINDINGS for start in ("There is", "No")]
LONG = " ".join(f"There is {finding} in the {side} lung." for finding in FINDINGS for side in ("left", "right"))


@pytest.fixture
def encoder(tmp_path: Path) -> BertTextEncoder:
    torch.manual_seed(0)
    return BertTextEncoder.from_scratch([*REPORTS, LONG] * 4, tmp_path, 300, width=32, layers=1, context_length=24)


def masking(encoder: BertTextEncoder, **settings: Any) -> EntityMasking:
    torch.manual_seed(1)
    return EntityMasking(MaskingSettings(weight=1.0, **settings), encoder, 8, 1)


def test_a_draw_is_a_function_of_its_seed_alone(encoder: BertTextEncoder) -> None:
    model = masking(encoder)
    one = model.mask(encoder, [REPORTS[0], LONG], [7, 8])
    alone = model.mask(encoder, [LONG], [8])
    length = alone.input_ids.shape[1]
    assert torch.equal(one.input_ids[1, :length], alone.input_ids[0])
    assert torch.equal(one.targets[one.owner == 1], alone.targets)
    draws = {tuple(model.mask(encoder, [LONG], [100 * epoch + 8]).input_ids[0].tolist()) for epoch in range(20)}
    assert len(draws) > 15


def test_targets_are_what_stood_at_the_chosen_places(encoder: BertTextEncoder) -> None:
    model, seeds = masking(encoder), list(range(len(REPORTS)))
    masked, plain = model.mask(encoder, REPORTS, seeds), encoder.tokens(REPORTS)
    assert torch.equal(plain.input_ids[masked.chosen], masked.targets)
    assert torch.equal(plain.input_ids[~masked.chosen], masked.input_ids[~masked.chosen])
    assert not (masked.chosen & plain.special_mask).any()
    assert masked.owner.unique().tolist() == list(range(len(REPORTS)))  # at least one of each report
    empty = model.mask(encoder, ["", "..."], ["0", "1"])
    assert not empty.chosen.any()


def test_rates_on_many_reports(encoder: BertTextEncoder) -> None:
    encoder.context_length = 200
    model = masking(encoder, entities=("finding", "cue"))
    masked = model.mask(encoder, [LONG] * 300, list(range(300)))
    everything = masking(encoder, entity_rate=1.0, word_rate=1.0).mask(encoder, [LONG] * 300, ["0"] * 300)
    share = {
        kind: (masked.entity == kind).sum().item() / (everything.entity == kind).sum().item() for kind in (True, False)
    }
    assert share[True] == pytest.approx(0.5, abs=0.03)
    assert share[False] == pytest.approx(0.1, abs=0.02)
    replaced = masked.input_ids[masked.chosen]
    assert (replaced == encoder.mask_id).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (replaced == masked.targets).float().mean().item() == pytest.approx(0.1, abs=0.03)


def test_of_a_long_report_every_chunk_is_drawn(encoder: BertTextEncoder) -> None:
    parts = encoder.chunks(LONG)
    assert len(parts) > 2
    model = masking(encoder, entity_rate=0.0, word_rate=0.01)
    seen = Counter[int]()
    first = [encoder.tokens([part]).input_ids.shape[1] for part in parts]
    for seed in range(60):
        masked = model.mask(encoder, [LONG], [seed])
        assert masked.input_ids.shape[1] <= encoder.context_length
        tokens = [encoder.tokens([part]).input_ids[0] for part in parts]
        fits = [i for i, ids in enumerate(tokens) if first[i] == masked.input_ids.shape[1]
                and (ids == masked.input_ids[0]).float().mean() > 0.7]  # fmt: skip
        seen.update(fits)
    assert set(seen) == set(range(len(parts)))


def test_the_gradient_reaches_ct_encoder_text_tower_and_head(encoder: BertTextEncoder) -> None:
    torch.manual_seed(0)
    ct = ResNet3D("small", base_width=8)
    model = EntityMasking.beside(DualEncoder(ct, encoder), MaskingSettings(weight=1.0), (16, 16, 16))
    tokens = ct(torch.randn(2, 1, 16, 16, 16)).tokens
    masked_language_loss(*model(encoder, REPORTS[:2], ["0", "1"], tokens))["total"].backward()
    for part in (ct, encoder, model):
        assert all(p.grad is not None for p in part.parameters())
        assert sum(p.grad.abs().sum().item() for p in part.parameters() if p.grad is not None) > 0


def test_building_it_leaves_the_random_state(encoder: BertTextEncoder) -> None:
    dual = DualEncoder(ResNet3D("small", base_width=8), encoder)
    before = torch.get_rng_state()
    EntityMasking.beside(dual, MaskingSettings(weight=1.0), (16, 16, 16))
    assert torch.equal(torch.get_rng_state(), before)


def overfit(encoder: BertTextEncoder, tokens: Tensor) -> tuple[EntityMasking, float]:
    """A head and a tower trained on eight pairs, and their loss on draws that training did not see."""
    model = masking(encoder, entity_rate=1.0, word_rate=0.0)
    parameters = [*encoder.parameters(), *model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    for step in range(120):
        optimizer.zero_grad()
        seeds = [100 * step + row for row in range(len(REPORTS))]
        masked_language_loss(*model(encoder, REPORTS, seeds, tokens))["total"].backward()
        optimizer.step()
    return model, unseen(encoder, model, tokens)


@torch.no_grad()
def unseen(encoder: BertTextEncoder, model: EntityMasking, tokens: Tensor) -> float:
    parts = [
        model(encoder, REPORTS, [f"unseen-{draw}-{row}" for row in range(len(REPORTS))], tokens) for draw in range(20)
    ]
    sums, counts = (torch.cat(column) for column in zip(*parts, strict=True))
    return masked_language_loss(sums, counts)["total"].item()


def test_what_only_the_ct_tells_is_read_from_its_tokens(encoder: BertTextEncoder) -> None:
    start = {name: value.clone() for name, value in encoder.state_dict().items()}
    told = 3 * torch.eye(8)[:, None]
    model, with_tokens = overfit(encoder, told)
    with_others = unseen(encoder, model, told.roll(2, dims=0))  # the tokens of the next finding
    encoder.load_state_dict(start)
    _, without = overfit(encoder, torch.zeros_like(told))
    assert with_tokens < 0.3
    assert without > 3 * with_tokens
    assert with_others > 10 * with_tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bidirectional": False},
            r"\(BertTextEncoder\) is causal.*expected a bidirectional one.*text\.tower to scratch",
        ),
        ({"trainable": False}, r"is frozen; expected a trainable one\. Set text\.trainable to true"),
        ({"mask_id": None}, r"has no mask token in its vocabulary; expected one such as \[MASK\]"),
    ],
)
def test_towers_that_cannot_learn_from_it_are_refused(
    encoder: BertTextEncoder, change: dict[str, Any], message: str
) -> None:
    for name, value in change.items():
        setattr(encoder, name, value)
    with pytest.raises(InputError, match=message):
        masking(encoder)


def test_of_the_x_ray_expert_s_towers_the_causal_one_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "expert"
    make_expert_folder(
        folder, REPORTS * 4, image_size=32, embed_dim=24, vision="vit", text_width=32, text_layers=1,
        context_length=24, vocab_size=200, seed=3,
    )  # fmt: skip
    shipped = ExpertTextEncoder.from_expert(str(folder), trainable=True)
    assert EntityMasking(MaskingSettings(weight=1.0), shipped, 8).mask(shipped, REPORTS, REPORTS).chosen.any()
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["no_causal_mask"] = False
    path.write_text(json.dumps(config))
    causal = ExpertTextEncoder.from_expert(str(folder), trainable=True)
    with pytest.raises(InputError, match=r"\(ExpertTextEncoder\) is causal"):
        EntityMasking(MaskingSettings(weight=1.0), causal, 8)


def test_a_tokenizer_without_places_is_refused(encoder: BertTextEncoder) -> None:
    def tokens(texts: Any) -> Any:
        raise NotImplementedError("return_offset_mapping is not available when using Python tokenizers")

    encoder.tokens = tokens  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"does not return token offsets \(return_offset.*tokenizer\.json"):
        masking(encoder)


def test_settings_out_of_range_are_refused(encoder: BertTextEncoder) -> None:
    with pytest.raises(InputError, match=r"masking\.word_rate is 1\.5; expected a probability"):
        masking(encoder, word_rate=1.5)
    with pytest.raises(InputError, match="a rate above 0"):
        masking(encoder, entity_rate=0.0, word_rate=0.0)
    with pytest.raises(InputError, match="weight of 0 or more"):
        EntityMasking(MaskingSettings(weight=-1.0), encoder, 8, 1)
    with pytest.raises(InputError, match="unknown vocabulary 'nonsense'"):
        masking(encoder, vocabulary="nonsense")


def align(run: Path, cohort: Path, preset: Path, *more: str) -> int:
    options = ["--model.init_args.masking.weight=0.5", "--model.init_args.masking.vocabulary=phantom"]
    options += ["--model.init_args.text.trainable=true", *more]
    return main(["align", "--data", str(cohort), "--run", str(run), "--preset", str(preset), *options])


def copy_of(finished: Path, run: Path) -> Path:
    run.mkdir()
    for stage in ("expert", "index", "distill"):
        shutil.copytree(finished / stage, run / stage)
    shutil.copy(finished / "run.json", run / "run.json")
    return run


@pytest.mark.full
def test_a_stage_with_masking_is_killed_and_resumed(
    finished_run: Path, cohort: Path, tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole, resumed = copy_of(finished_run, tmp_path / "whole"), copy_of(finished_run, tmp_path / "resumed")
    assert align(whole, cohort, tiny_preset) == 0
    curves = pd.read_csv(whole / "align" / "logs" / "metrics.csv")
    for name in ("total", "accuracy", "accuracy_entity", "accuracy_other"):
        assert curves[f"train/efm_{name}"].notna().sum() == 2, name

    class Killed(BaseException):
        """Goes through whatever holds errors."""

    def die(self: AlignmentTask, *_: Any) -> None:
        if self.current_epoch == 1:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(AlignmentTask, "on_train_batch_start", die)
        with pytest.raises(Killed):
            align(resumed, cohort, tiny_preset)
    capsys.readouterr()
    assert align(resumed, cohort, tiny_preset) == 0
    assert "resuming from" in capsys.readouterr().out
    last = [torch.load(run / "align" / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, resumed)]
    assert any(name.startswith("entity_masking.head.") for name in last[0]["state_dict"])
    for name, value in last[0]["state_dict"].items():
        torch.testing.assert_close(last[1]["state_dict"][name], value, msg=name)
    artefact = read_artefact(whole / "align" / "artefact", "dual-encoder")
    assert not any("masking" in name for name in load_file(artefact.folder / "model.safetensors"))
    assert json.loads((whole / "align" / "metrics.json").read_text())["train_efm_total"] > 0


@pytest.mark.full
def test_a_frozen_tower_is_refused_before_training(
    finished_run: Path, cohort: Path, tiny_preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(finished_run, tmp_path / "run")
    assert align(run, cohort, tiny_preset, "--model.init_args.text.trainable=false") == 2
    assert "is frozen; expected a trainable one" in capsys.readouterr().err


class Ordered(CTDataModule):
    """The first 12 training rows in their order, dealt out to the ranks: a global batch is the same on any number."""

    def train_dataloader(self) -> DataLoader[Any]:
        mine = range(rank(), 12, world_size())
        dataset = self.dataset(self.training_rows())
        return DataLoader(dataset, self.batch_size, sampler=mine, collate_fn=self.collate)


def train(run: str, cohort: str, folder: str, micro_batch: int | None, batch: int) -> dict[str, Any]:
    """Weights and losses of 2 optimiser steps with masking in float64, on this process's ranks."""
    root, world = Path(run), world_size()
    L.seed_everything(3)
    task = AlignmentTask(
        expert=str(root / "expert" / "artefact"), index=str(root / "index" / "artefact"),
        student=str(root / "distill" / "artefact"), micro_batch=micro_batch,
        masking=MaskingSettings(weight=0.7, vocabulary="phantom"),
        text=TextSettings(tower="scratch", width=32, layers=1, vocab_size=300, context_length=64),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
    )  # fmt: skip
    data = Ordered(f"{cohort}/ct.csv", VOLUME, batch_size=batch, text="required")
    task.finish = lambda *_: {}  # type: ignore[method-assign]
    strategy: Any = SingleDeviceStrategy("cpu")
    if world > 1:
        os.environ["LOCAL_RANK"] = str(rank())
        environment = LightningEnvironment()
        environment.set_world_size(world)
        strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=environment)
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, precision="64-true", max_steps=2, logger=False,
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, use_distributed_sampler=False,
    )  # fmt: skip
    task.run(trainer, data, Path(folder))
    return {
        "weights": {name: value.double() for name, value in task.state_dict().items()},
        "losses": {name: trainer.callback_metrics[f"train/{name}"].double() for name in ("loss", "efm_total")},
    }


def assert_same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(result["losses"], expected["losses"], rtol=0, atol=1e-9)
    torch.testing.assert_close(result["weights"], expected["weights"], rtol=0, atol=1e-9)


@pytest.mark.full
@pytest.mark.ddp
def test_micro_batches_and_two_ranks_train_the_same_weights(
    finished_run: Path, cohort: Path, tmp_path: Path, pool: Callable[[int], Any]
) -> None:
    given = {"run": str(finished_run), "cohort": str(cohort)}
    expected = train(**given, folder=str(tmp_path / "plain"), micro_batch=None, batch=6)
    assert any(name.startswith("entity_masking.head.") for name in expected["weights"])
    assert_same(train(**given, folder=str(tmp_path / "micro"), micro_batch=4, batch=6), expected)
    arguments = {**given, "folder": str(tmp_path / "ranks"), "micro_batch": None, "batch": 3}
    for result in pool(2).run(__file__, "train", arguments):
        assert_same(result, expected)
