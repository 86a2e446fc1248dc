"""Where a text tower is trained it reads sentence subsets down to one sentence, or one-sentence prompts fail later."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from ctx_distill.data.transforms.augment import Augmentation
from ctx_distill.stages.align.task import AlignmentTask
from ctx_distill.stages.expert.task import ExpertTask
from ctx_distill.text.report_text import split_sentences
from ctx_distill.types import CTBatch, XrayBatch

ROWS = 300
SENTENCES = ("The heart of study {i} is enlarged.", "No pneumothorax in {i}.", "Small effusion in {i}.", "Aorta {i}.")
REPORTS = [" ".join(SENTENCES).format(i=i) for i in range(ROWS)]


def views_of_the_expert(monkeypatch: pytest.MonkeyPatch, share: float) -> list[str]:
    task: Any = ExpertTask(subset_share=share, section_weight=0.0)
    read: list[str] = []
    monkeypatch.setattr(
        task, "_image_to_report", lambda image, views, study: read.extend(views) or (torch.zeros(()), ROWS)
    )
    monkeypatch.setattr(task, "log_terms", lambda *_: None)
    rows = torch.arange(ROWS)
    task.training_step(XrayBatch(torch.zeros(ROWS, 1, 2, 2), rows, rows, REPORTS), 0)
    return read


class Dual(torch.nn.Module):
    """Keeps the texts that it is given to encode."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def encode_alone(self, volume: torch.Tensor) -> tuple[torch.Tensor, None]:
        return volume.flatten(1), None

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        self.read.extend(texts)
        return torch.zeros(len(texts), 1)


def views_of_alignment(monkeypatch: pytest.MonkeyPatch, share: float) -> list[str]:
    del monkeypatch
    task: Any = AlignmentTask.__new__(AlignmentTask)  # without expert and index, which have no part in this
    L.LightningModule.__init__(task)
    task.model, task.subset_share, task.augmentation = Dual(), share, Augmentation()
    task.entity_masking = task.prior = None
    rows = torch.arange(ROWS)
    task._encode(CTBatch(torch.zeros(ROWS, 1, 1, 1, 1), rows, rows, REPORTS))
    read: list[str] = task.model.read
    return read


@pytest.mark.parametrize("views", [views_of_the_expert, views_of_alignment])
def test_one_sentence_views_occur(
    views: Callable[[pytest.MonkeyPatch, float], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = views(monkeypatch, 0.75)
    sizes = torch.tensor([len(split_sentences(view)) for view in read])
    for report, view in zip(REPORTS, read, strict=True):
        own, taken = split_sentences(report), split_sentences(view)
        assert [sentence for sentence in own if sentence in taken] == taken
    # 3/8 of the cut views, and a quarter of the 3/8 whose size is drawn between one and all: .75 * (.375 + .094)
    assert float((sizes == 1).float().mean()) == pytest.approx(0.75 * 15 / 32, abs=0.08)
    assert set(sizes.tolist()) == {1, 2, 3, 4}
    singles = {view.replace(str(i), "{i}") for i, view in enumerate(read) if sizes[i] == 1}
    assert singles == set(SENTENCES)
    assert views(monkeypatch, 0.0) == REPORTS


def test_the_expert_s_second_contrast_reads_single_sentences_too(monkeypatch: pytest.MonkeyPatch) -> None:
    task: Any = ExpertTask()
    task._sections = {i: (report, "An impression.") for i, report in enumerate(REPORTS)}
    read: list[list[str]] = []

    def text(reports: list[str]) -> torch.Tensor:
        read.append(reports)
        return torch.nn.functional.normalize(torch.ones(len(reports), 2), dim=-1)

    monkeypatch.setattr(task, "_text", text)
    task.model = SimpleNamespace(logit_scale=torch.zeros(()))
    rows = torch.arange(ROWS)
    task._section_to_section(XrayBatch(torch.zeros(ROWS, 1, 2, 2), rows, rows, REPORTS), 0)
    sizes = {len(split_sentences(view)) for view in read[0]}
    assert sizes == {1, 2, 3, 4}
