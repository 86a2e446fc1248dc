"""The parts that tasks share: study means, prompt pairs, schedules, curves over a resume, false negatives' evidence."""

from __future__ import annotations

import itertools
import math
import struct
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboardX.proto.event_pb2 import Event, SessionLog

from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.stages.shared.prompt_scores import pair_probabilities, prompt_features
from ctx_distill.training.base_task import decay_groups
from ctx_distill.training.epoch_means import EpochMeans
from ctx_distill.training.predictions import study_means
from ctx_distill.training.resumed_logs import cut_logs, join_history
from ctx_distill.training.schedule import warmup_cosine


def test_study_means_are_pandas_group_means_in_manifest_order(cohort: Path) -> None:
    manifest = read_manifest(cohort / "ct.csv")
    values = np.random.default_rng(0).random((len(manifest), 3))
    studies, means = study_means(manifest, values)
    expected = pd.DataFrame(values).groupby(manifest.frame["study_id"].to_numpy(), sort=False).mean()
    assert list(studies["study_id"]) == list(expected.index)
    np.testing.assert_allclose(means, expected.to_numpy())


def test_the_probability_of_a_pair_is_its_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    image, positive, negative = (F.normalize(torch.randn(n, 8, generator=generator), dim=-1) for n in (5, 3, 3))
    logits = 7.0 * torch.stack([image @ positive.T, image @ negative.T])
    torch.testing.assert_close(pair_probabilities(image, positive, negative, 7.0), logits.softmax(dim=0)[0])


def test_prompt_features_are_the_mean_of_every_synonym_s_prompts() -> None:
    seen: list[str] = []

    def encode(texts: list[str]) -> torch.Tensor:
        seen.extend(texts)
        return F.normalize(torch.tensor([[float(len(text)), 1.0, float(text.count("n"))] for text in texts]), dim=-1)

    positive, negative = prompt_features(encode, ["pleural effusion"], "default", synonyms=False)
    assert seen == ["Pleural effusion is present.", "Pleural effusion is not present."]
    torch.testing.assert_close(positive[0], encode(seen[:1])[0])
    torch.testing.assert_close(negative[0], encode(seen[1:2])[0])
    seen.clear()
    prompt_features(encode, ["pleural effusion"], "default", synonyms=True)
    assert len(seen) > 2
    assert all("is present" in text or "is not present" in text for text in seen)


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    rates = [warmup_cosine(step, steps=100, warmup=10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert rates[100] == pytest.approx(0.0)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_only_matrices_decay_and_frozen_weights_are_left_out() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 3))
    module[2].requires_grad_(False)
    decaying, plain = decay_groups(module)
    assert [tuple(p.shape) for p in decaying["params"]] == [(3, 2)]
    assert [tuple(p.shape) for p in plain["params"]] == [(3,), (3,), (3,)]
    assert plain["weight_decay"] == 0.0


class Logs:
    """A trainer as far as `cut_logs` looks at it."""

    def __init__(self, *loggers: TensorBoardLogger, is_global_zero: bool = True) -> None:
        self.loggers, self.is_global_zero = loggers, is_global_zero


def curve(path: Path, steps: list[int], losses: list[float]) -> None:
    pd.DataFrame({"epoch": range(len(steps)), "step": steps, "train/loss": losses}).to_csv(path, index=False)


def test_curves_are_cut_back_to_the_restored_step_and_joined(tmp_path: Path) -> None:
    curves = tmp_path / "metrics.csv"
    curve(curves, [4, 9, 14], [3.0, 2.0, 1.5])
    history = cut_logs(Logs(), curves, 10)
    assert not curves.exists()
    # killed again after one more row, which is restored too
    curve(curves, [14], [1.4])
    assert cut_logs(Logs(), curves, 15) == history
    curve(curves, [19], [1.2])
    join_history(history, curves)
    assert pd.read_csv(curves)["train/loss"].tolist() == [3.0, 2.0, 1.4, 1.2]
    assert not history.exists()


def test_of_ranks_that_resume_at_once_one_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no process group yet. The other rank comes at the worst moment: as the first one deletes the table."""
    curves = tmp_path / "metrics.csv"
    curve(curves, [4, 9, 14], [3.0, 2.0, 1.5])
    unlink = Path.unlink

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        monkeypatch.setattr(Path, "unlink", unlink)
        assert cut_logs(Logs(is_global_zero=False), curves, 10) == curves.with_name("metrics.before.csv")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", interrupted)
    history = cut_logs(Logs(), curves, 10)
    assert Path.unlink is unlink
    join_history(history, curves)
    assert pd.read_csv(curves)["train/loss"].tolist() == [3.0, 2.0]


def test_a_run_that_begins_again_keeps_no_curve(tmp_path: Path) -> None:
    curves = tmp_path / "metrics.csv"
    curve(curves, [4, 9], [3.0, 2.0])
    history = cut_logs(Logs(), curves, 0)
    curve(curves, [4], [2.9])
    join_history(history, curves)
    assert pd.read_csv(curves)["train/loss"].tolist() == [2.9]


def test_a_run_restored_at_its_end_keeps_its_curve(tmp_path: Path) -> None:
    curves = tmp_path / "metrics.csv"
    curve(curves, [4, 9], [3.0, 2.0])
    join_history(cut_logs(Logs(), curves, 10), curves)
    assert pd.read_csv(curves)["train/loss"].tolist() == [3.0, 2.0]


def events_of(folder: Path) -> list[Event]:
    """Of all TensorBoard files, in the order they were logged: length, its checksum, the event, its checksum."""
    found = []
    for path in folder.glob("events.*"):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return sorted(found, key=lambda event: event.wall_time)


def test_tensorboard_is_told_to_forget_what_comes_after_the_restored_step(tmp_path: Path) -> None:
    for first, value in ((0, 1.0), (5, 2.0)):
        logger = TensorBoardLogger(str(tmp_path), name="", version="logs")
        cut_logs(Logs(logger), tmp_path / "metrics.csv", first)
        for step in range(first, 8):
            logger.log_metrics({"loss": value}, step)
        logger.finalize("success")
        time.sleep(1.1)  # a file is named by the second
    events = events_of(tmp_path / "logs")
    starts = [event.step for event in events if event.session_log.status == SessionLog.START]
    assert starts == [5]  # TensorBoard drops what came before this mark with this step or a later one
    assert [event.step for event in events if event.summary.value] == [*range(8), *range(5, 8)]


def test_means_of_an_epoch_are_weighted_and_live_in_a_checkpoint() -> None:
    means = EpochMeans()
    means.add({"loss": torch.tensor(1.0)}, 3)
    other = EpochMeans()
    other.load(means.state())
    for one in (means, other):
        one.add({"loss": torch.tensor(5.0), "rare": torch.tensor(2.0)}, 1)
        assert {name: float(value) for name, value in one.drain().items()} == {"loss": 2.0, "rare": 2.0}
        assert one.drain() == {}
