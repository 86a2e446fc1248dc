"""The parts that tasks share: study means, prompt pairs, schedules, curves over a resume, false negatives' evidence."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from ctx_distill.data.manifest import read_manifest
from ctx_distill.tasks.base import decay_groups, join_history, keep_history, readable_checkpoint, warmup_cosine
from ctx_distill.tasks.predict import study_means
from ctx_distill.tasks.prompting import pair_probabilities, prompt_features


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


def test_curves_of_before_a_resume_stay_in_front_without_the_steps_run_again(tmp_path: Path) -> None:
    curves = tmp_path / "metrics.csv"
    pd.DataFrame({"epoch": [0, 1, 2], "step": [4, 9, 14], "train/loss": [3.0, 2.0, 1.5]}).to_csv(curves, index=False)
    history = keep_history(curves)
    pd.DataFrame({"epoch": [2, 3], "step": [14, 19], "train/loss": [1.4, 1.2]}).to_csv(curves, index=False)
    join_history(history, curves)
    assert pd.read_csv(curves)["train/loss"].tolist() == [3.0, 2.0, 1.4, 1.2]


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    assert readable_checkpoint(tmp_path) is None
    torch.save({"state_dict": {"a": torch.zeros(100)}}, path)
    assert readable_checkpoint(tmp_path) == str(path)
    path.write_bytes(path.read_bytes()[:-200])
    assert readable_checkpoint(tmp_path) is None
    assert "not readable" in capsys.readouterr().out
