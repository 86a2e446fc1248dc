"""Baseline: zero-shot evaluation of the frozen X-ray expert on each CT's own projection, without CT training (**ours**)."""

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
from ctx_distill.stages.zero_shot.task import Prompts, evaluate_studies
from ctx_distill.text.prompts import Templates
from ctx_distill.training.base_task import StageTask
from ctx_distill.types import CTBatch


class ProjectionZeroShotTask(StageTask):
    """Predict zero-shot findings of the CT `test` studies from their frontal projections.

    The output files are those of `ZeroShotTask`.

    Args:
        expert: Folder or hub name of the X-ray expert.
        expert_revision: Pinned commit of a hub expert.
        templates: `default`, `ensemble` or `normal`; see `prompt_pairs`.
        synonyms: Also use the vocabulary's synonyms of a finding.
        vocabulary: Findings to predict if the manifest has no label columns.

    Raises:
        InputError: The expert has no joint space of images and texts.
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
                f"{expert}: this expert has no text tower in a joint space with its images, so it cannot be evaluated with "
                "prompts. Set one with text (open_clip, SigLIP) with --expert or --model.init_args.expert=<folder>."
            )
        self.prompts = Prompts(templates, synonyms, vocabulary)

    def describe(self) -> dict[str, Any]:
        """Return a description of the expert."""
        return {"expert": self.expert.describe()}

    def predict_step(self, batch: CTBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return features (B, D_e), unit rows, of the projections."""
        del batch_idx
        return {"image": embed_projection(batch, self.expert), "row": batch.row}

    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Predict findings, write `predictions.csv`, and score them if there are labels."""
        assert isinstance(datamodule, CTDataModule)
        if not datamodule.projection:
            raise InputError(
                "zero-shot: the projection baseline needs projections, but the data module computes none. Set "
                "data.init_args.projection=true."
            )
        scale = self.expert.logit_scale or 1.0
        return evaluate_studies(trainer, self, datamodule, folder, self.prompts, self.expert.encode_text, scale)
