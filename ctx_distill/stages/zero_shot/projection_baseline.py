"""Baseline: the frozen X-ray expert asked about each CT's own projection, with no CT training at all (**ours**)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.errors import InputError
from ctx_distill.models.opening import open_expert
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.stages.distill.targets import embed_projection
from ctx_distill.stages.zero_shot.task import Prompts, ask_test_studies
from ctx_distill.text.prompts import Templates
from ctx_distill.training.base_task import StageTask
from ctx_distill.types import CTBatch


class ProjectionZeroShotTask(StageTask):
    """Zero-shot findings of the CT `test` studies out of their frontal projections; leaves what `ZeroShotTask` leaves.

    Args:
        expert: folder or hub name of the X-ray expert.
        expert_revision: pinned commit of a hub expert.
        templates: `default`, `ensemble` or `normal`, see `prompt_pairs`.
        synonyms: ask with the vocabulary's synonyms of a finding too.
        vocabulary: findings to ask for where the manifest has no label columns.

    Raises:
        InputError: the expert's texts do not lie in the space of its images.
    """

    def __init__(
        self,
        expert: str,
        expert_revision: str | None = None,
        templates: Templates = "normal",
        synonyms: bool = True,
        vocabulary: str = "ct-rate",
    ) -> None:
        super().__init__()
        self.expert: XrayExpert = open_expert(expert, expert_revision)
        if not self.expert.has_joint_space:
            raise InputError(
                f"{expert}: this expert has no text tower trained against its images, so it cannot be asked with "
                "prompts. Give one with text (open_clip, SigLIP) with --expert or --model.init_args.expert=<folder>."
            )
        self.prompts = Prompts(templates, synonyms, vocabulary)

    def describe(self) -> dict[str, Any]:
        """The expert."""
        return {"expert": self.expert.describe()}

    def predict_step(self, batch: CTBatch, batch_idx: int) -> dict[str, Tensor]:
        """Features (B, D_e), unit rows, of the projections."""
        del batch_idx
        return {"image": embed_projection(batch, self.expert), "row": batch.row}

    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Ask, write `predictions.csv`, score where there are labels."""
        assert isinstance(datamodule, CTDataModule)
        if not datamodule.projection:
            raise InputError(
                "the expert is to be asked about the CTs' own projections, but the data module computes none. Set "
                "data.init_args.projection=true."
            )
        scale = self.expert.logit_scale or 1.0
        return ask_test_studies(trainer, self, datamodule, folder, self.prompts, self.expert.encode_text, scale)
