"""The expert's second contrast, between findings and impressions: images of one study are no negatives of each other."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ctx_distill
from ctx_distill.stages.expert.task import ExpertTask
from ctx_distill.types import XrayBatch

SCALE = 3.0
STUDIES = [7, 2, 7, 5]
CT = [(7, "A nodule.", "Nodule."), (7, "An effusion.", "Effusion.")]


def vector(text: str) -> np.ndarray:
    draw = np.random.default_rng(sum(map(ord, text))).normal(size=4)
    return draw / np.linalg.norm(draw)


def expected() -> float:
    """InfoNCE with uniform targets over the rows of the same study, both directions, in NumPy."""
    pairs = [(("x", study), f"Finding {n}.", f"Impression {n}.") for n, study in enumerate(STUDIES)]
    pairs += [(("ct", study), findings, impression) for study, findings, impression in CT]
    same = np.array([[one == other for other, *_ in pairs] for one, *_ in pairs], dtype=float)
    targets = same / same.sum(1, keepdims=True)
    logits = SCALE * np.stack([vector(f) for _, f, _ in pairs]) @ np.stack([vector(i) for _, _, i in pairs]).T
    total = 0.0
    for scores in (logits, logits.T):
        log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        total -= (targets * log_p).sum(1).mean() / 2
    return total


def loss_of(rows: list[int]) -> float:
    """Of this rank's rows of the batch."""
    task: Any = ExpertTask()
    task._sections = {n: (f"Finding {n}.", f"Impression {n}.") for n in range(len(STUDIES))}
    task._reports = CT
    task._text = lambda reports: torch.tensor(np.array([vector(text) for text in reports]).reshape(len(reports), 4))
    task.model = SimpleNamespace(logit_scale=torch.tensor(SCALE, dtype=torch.float64).log())
    study = torch.tensor([STUDIES[row] for row in rows])
    batch = XrayBatch(torch.zeros(len(rows), 1, 2, 2), study, torch.tensor(rows), [""] * len(rows))
    return float(task._section_to_section(batch, 0))


def test_images_of_one_study_are_positives() -> None:
    assert loss_of([0, 1, 2, 3]) == pytest.approx(expected(), abs=1e-9)


def rank_loss() -> float:
    from ctx_distill.distributed import rank

    return loss_of([[0, 1], [2, 3]][rank()])


@pytest.mark.ddp
def test_across_ranks_too(pool: Callable[[int], Any]) -> None:
    assert pool(2).run(__file__, "rank_loss", {}) == pytest.approx([expected()] * 2, abs=1e-9)


def test_every_contrastive_loss_of_the_package_is_given_the_studies() -> None:
    """Or targets, which already hold them."""
    losses = {"contrastive_loss", "siglip_loss", "soft_target_loss"}
    calls = []
    for path in Path(ctx_distill.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in losses:
                calls.append((path.name, ast.unparse(node)))
    assert len(calls) >= 5
    assert [call for call in calls if "study" not in call[1] and "targets" not in call[1]] == []
