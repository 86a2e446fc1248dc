"""Stage 2: the frozen X-ray expert's knowledge goes into the CT encoder (method, stage 2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from ctx_distill.data.augment import Augmentation
from ctx_distill.data.datamodules import CTDataModule
from ctx_distill.distributed import gather_with_gradient, rank
from ctx_distill.errors import InputError
from ctx_distill.losses.distillation import distillation_loss
from ctx_distill.metrics.classification import classification_report
from ctx_distill.models.ct_encoder import CTEncoder
from ctx_distill.models.dual_encoder import save_ct_encoder
from ctx_distill.models.heads import ProjectionHead
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.retrieval.lookup import LookupMode, NeighbourLookup
from ctx_distill.tasks.base import TrainedTask, adamw, last_values
from ctx_distill.tasks.predict import predict_rows, study_means
from ctx_distill.tasks.prompting import pair_probabilities, prompt_features
from ctx_distill.tasks.teacher import open_teacher
from ctx_distill.text.findings import load_vocabulary
from ctx_distill.types import CTBatch


@dataclass(frozen=True)
class NeighbourSettings:
    """How a CT report's nearest X-rays become one target; see `NeighbourLookup`."""

    k: int = 8
    mode: LookupMode = "mean"
    temperature: float = 0.07


@dataclass(frozen=True)
class DistillationWeights:
    """Weights of the two parts of the loss."""

    pair: float = 1.0
    relation: float = 1.0


class DistillationTask(TrainedTask):
    """Distillation of the expert's embedding and its relations, looked up live in every rank.

    The expert is no submodule: it is neither trained nor saved.

    Args:
        encoder: the CT encoder to train.
        expert: folder or hub name of the X-ray expert.
        index: folder of the stage-1 artefact.
        expert_revision: pinned commit of a hub expert.
        neighbours: how the retrieved X-rays are mixed.
        weights: of the pair-wise and the relation loss.
        tau: temperature of the relation; None takes the expert's own.
        anchors: `batch`: the report embeddings of the global batch; `prompts`: findings prompts; both in the expert's
            joint space.
        vocabulary: findings whose prompts are anchors.
        augmentation: of the volumes.
        optimizer: see `TrainedTask`.
        scheduler: see `TrainedTask`.
        warmup: see `TrainedTask`.
        select: see `TrainedTask`.
    """

    def __init__(
        self,
        encoder: CTEncoder,
        expert: str,
        index: str,
        expert_revision: str | None = None,
        neighbours: NeighbourSettings = NeighbourSettings(),
        weights: DistillationWeights = DistillationWeights(),
        tau: float | None = None,
        anchors: Literal["batch", "prompts"] = "batch",
        vocabulary: str = "ct-rate",
        augmentation: Augmentation = Augmentation(),
        optimizer: OptimizerCallable = adamw,
        scheduler: LRSchedulerCallable | None = None,
        warmup: float = 0.05,
        select: Literal["last", "best"] = "last",
    ) -> None:
        super().__init__(optimizer, scheduler, warmup, select)
        teacher, store = open_teacher(expert, expert_revision, index)
        self._teacher = (teacher,)
        self.store = store
        self.lookup = NeighbourLookup(store, min(neighbours.k, len(store)), neighbours.mode, neighbours.temperature)
        self.encoder = encoder
        self.projection = ProjectionHead(encoder.embed_dim, store.value_dim)
        self.weights = {"pair": weights.pair, "relation": weights.relation}
        scale = teacher.logit_scale
        if tau is None and scale is None:
            raise InputError(f"{expert}: names no temperature of its own; set ARGS=--model.init_args.tau=0.05.")
        self.tau = tau if tau is not None else 1.0 / float(scale or 1.0)
        self.anchors, self.vocabulary = anchors, vocabulary
        self.augmentation = augmentation
        self._prompts: Tensor | None = None

    @property
    def teacher(self) -> XrayExpert:
        """The frozen expert, on this module's device."""
        return self._teacher[0].to(self.device)

    def features(self, volume: Tensor) -> Tensor:
        """h~ before normalisation: (B, 1, D, H, W) -> (B, D_e)."""
        projected: Tensor = self.projection(self.encoder(volume).pooled)
        return projected

    def _anchors(self, queries: Tensor) -> Tensor:
        if self.anchors == "batch" and queries.shape[0] > 1:
            return queries
        if self._prompts is None:
            names = [finding.name for finding in load_vocabulary(self.vocabulary).findings]
            positive, negative = prompt_features(self.teacher.encode_text, names, "default")
            self._prompts = torch.cat([positive, negative])
        return self._prompts.to(queries.device)

    def _terms(self, batch: CTBatch, augment: bool) -> dict[str, Tensor]:
        volume = self.augmentation(batch.volume) if augment else batch.volume
        with torch.no_grad():
            queries = self.teacher.encode_text(batch.report)
            target = self.lookup(queries)["features"]
        student = gather_with_gradient(self.features(volume))
        target, queries = gather_with_gradient(target), gather_with_gradient(queries)
        terms = distillation_loss(student, target, self._anchors(queries), self.tau, self.weights)
        terms["loss"] = terms.pop("total")
        return terms

    def training_step(self, batch: CTBatch, batch_idx: int) -> Tensor:
        """L_distill of a batch."""
        del batch_idx
        terms = self._terms(batch, augment=True)
        self.log_terms(terms, "train", len(batch.row))
        return terms["loss"]

    def validation_step(self, batch: CTBatch, batch_idx: int) -> None:
        """The same without augmentation."""
        del batch_idx
        self.log_terms(self._terms(batch, augment=False), "val", len(batch.row))

    def predict_step(self, batch: CTBatch, batch_idx: int) -> dict[str, Tensor]:
        """Normalised features (B, D_e)."""
        del batch_idx
        return {"features": F.normalize(self.features(batch.volume), dim=-1), "row": batch.row}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Mark what the checkpoint belongs to; the expert is not in it."""
        checkpoint["expert"] = self.teacher.fingerprint()

    def finish(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Write the student; ask it with the expert's prompts on CT `val`, where there are labels."""
        assert isinstance(datamodule, CTDataModule)
        if rank() == 0:
            save_ct_encoder(
                folder / "artefact",
                self.encoder,
                self.projection,
                {"xray-expert": self.teacher.fingerprint(), "xray-index": self.store.fingerprint},
                datamodule.volume.to_config(),
            )
        metrics: dict[str, Any] = last_values(trainer)
        metrics["tau"] = self.tau
        val = datamodule.manifest.split("val")
        if len(val) and datamodule.manifest.finding_names:
            found = predict_rows(trainer, self, datamodule.loader(val), list(val.frame.index))
            names = list(datamodule.manifest.finding_names)
            positive, negative = prompt_features(self.teacher.encode_text, names, "normal")
            scores = pair_probabilities(found["features"], positive.cpu(), negative.cpu(), 1 / self.tau)
            studies, means = study_means(val, scores.numpy())
            labels = studies[[f"label:{name}" for name in names]].to_numpy()
            report = classification_report(labels, means, names, studies["patient_id"].tolist())
            metrics["macro_auroc"] = report["macro_auroc"]
        return metrics
