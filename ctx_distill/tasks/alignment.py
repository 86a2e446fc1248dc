"""Stage 3: robust contrastive alignment of CT and report, from the stage-2 weights (method, stage 3)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from ctx_distill.checkpoint import hash_json, require_same
from ctx_distill.data.augment import Augmentation
from ctx_distill.data.datamodules import CTDataModule
from ctx_distill.distributed import gather_with_gradient, rank
from ctx_distill.errors import InputError
from ctx_distill.losses.contrastive import contrastive_loss
from ctx_distill.losses.robust import identification_quality
from ctx_distill.metrics.retrieval import recall_at_k
from ctx_distill.models.ct_encoder import CTEncoder
from ctx_distill.models.dual_encoder import DualEncoder, load_ct_encoder, projection_head
from ctx_distill.models.text_encoder import TextEncoder
from ctx_distill.models.xray_expert import XrayExpert, open_expert
from ctx_distill.retrieval.lookup import NeighbourLookup
from ctx_distill.retrieval.store import XrayIndexArtefact
from ctx_distill.tasks.base import TrainedTask, adamw, last_values
from ctx_distill.tasks.false_negatives import FalseNegatives, RobustSettings
from ctx_distill.tasks.predict import predict_rows
from ctx_distill.text.report import sample_sentences
from ctx_distill.types import CTBatch


class AlignmentTask(TrainedTask):
    """InfoNCE over the global batch with corrected false negatives.

    Args:
        expert: folder or hub name of the X-ray expert: its frozen text tower gives the evidence.
        index: folder of the stage-1 artefact.
        text_encoder: the report tower.
        student: folder of the stage-2 artefact; None starts from `encoder` as it is.
        encoder: the CT encoder where there is no student.
        expert_revision: pinned commit of a hub expert.
        robust: which false negatives are corrected and how.
        neighbours: X-rays mixed into the evidence `retrieved`.
        subset_share: share of steps in which a report is cut to a random subset of its sentences, down to one.
        augmentation: of the volumes.
        chunk: rows of logits held at once; None holds all.
        optimizer: see `TrainedTask`.
        scheduler: see `TrainedTask`.
        warmup: see `TrainedTask`.
        select: see `TrainedTask`.
    """

    def __init__(
        self,
        expert: str,
        index: str,
        text_encoder: TextEncoder,
        student: str | None = None,
        encoder: CTEncoder | None = None,
        expert_revision: str | None = None,
        robust: RobustSettings = RobustSettings(),
        neighbours: int = 8,
        subset_share: float = 0.75,
        augmentation: Augmentation = Augmentation(),
        chunk: int | None = None,
        optimizer: OptimizerCallable = adamw,
        scheduler: LRSchedulerCallable | None = None,
        warmup: float = 0.05,
        select: Literal["last", "best"] = "last",
    ) -> None:
        super().__init__(optimizer, scheduler, warmup, select)
        teacher = open_expert(expert, expert_revision)
        store = XrayIndexArtefact.open(Path(index))
        require_same(
            f"the expert {expert}", teacher.fingerprint(),
            f"the expert that the index {index} was built with", store.expert_fingerprint,
            "Build the index again with this expert (make stage-1), or give the expert that it was built with.",
        )  # fmt: skip
        self._teacher = (teacher,)
        self.lookup = NeighbourLookup(store, min(neighbours, len(store)), "mean")
        self.student_spec: str | None = None
        self.upstream = {"xray-expert": teacher.fingerprint(), "xray-index": store.fingerprint}
        image_projection = None
        if student is not None:
            encoder, image_projection = self._take_student(student, teacher, store)
        elif encoder is None:
            raise InputError("stage 3 got neither a student nor an encoder. Run make stage-2, or give `encoder`.")
        if image_projection is None or image_projection.out_features != text_encoder.embed_dim:
            image_projection = projection_head(encoder.embed_dim, text_encoder.embed_dim)
        self.model = DualEncoder(
            encoder, text_encoder, image_projection=image_projection, logit_scale=teacher.logit_scale or 14.3
        )
        self.robust, self.subset_share = robust, subset_share
        self.augmentation, self.chunk = augmentation, chunk
        self.false_negatives: FalseNegatives | None = None
        self._quality = {"hits": 0.0, "suspected": 0.0, "actual": 0.0}

    def _take_student(self, student: str, teacher: XrayExpert, store: XrayIndexArtefact) -> tuple[CTEncoder, Any]:
        """Encoder and projection of a stage-2 artefact, after checking what it was made from."""
        taken = load_ct_encoder(Path(student))
        for what, name, own in (
            ("expert", "xray-expert", teacher.fingerprint()),
            ("index", "xray-index", store.fingerprint),
        ):
            require_same(
                f"the {what} given to stage 3", own,
                f"the {what} that the student {student} was distilled from", taken.artefact.upstream[name],
                "Run make stage-2 again, or give the one that it was distilled from.",
            )  # fmt: skip
        self.student_spec = hash_json(taken.volume_spec)
        self.upstream["ct-encoder"] = taken.artefact.fingerprint
        return taken.encoder, taken.projection

    def setup(self, stage: str) -> None:
        """Check the volume spec; fix the false negatives' evidence on the training studies."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if stage != "fit" or not isinstance(datamodule, CTDataModule):
            return
        if self.student_spec is not None:
            require_same(
                "the volume spec of stage 3", hash_json(datamodule.volume.to_config()),
                "the volume spec that the student was distilled with", self.student_spec,
                "Give both stages the same data.init_args.volume.",
            )  # fmt: skip
        if not self.robust.evidence:
            return
        train = datamodule.training_rows()
        self.false_negatives = FalseNegatives(
            self.robust,
            list(train.frame.index),
            torch.from_numpy(train.study_codes()),
            [train.report(row) for row in train.frame.index],
            self._teacher[0].to(self.trainer.strategy.root_device),
            self.lookup,
        )

    def _views(self, batch: CTBatch) -> list[str]:
        """This epoch's view of each report: a function of epoch and row alone."""
        views = []
        for row, report in zip(batch.row.tolist(), batch.report, strict=True):
            rng = random.Random(f"{self.current_epoch}-{row}")
            views.append(sample_sentences(report, rng) if rng.random() < self.subset_share else report)
        return views

    def training_step(self, batch: CTBatch, batch_idx: int) -> Tensor:
        """InfoNCE with corrected targets over the global batch."""
        del batch_idx
        image, _ = self.model.encode_volume(self.augmentation(batch.volume))
        text = self.model.encode_text(self._views(batch))
        study = gather_with_gradient(batch.study)
        image, text = gather_with_gradient(image), gather_with_gradient(text)
        scale = self.model.logit_scale.exp()
        if self.false_negatives is None:
            terms = contrastive_loss(image, text, scale, study=study, chunk=self.chunk)
        else:
            gathered = {
                name: gather_with_gradient(value) for name, value in self.false_negatives.features(batch.row).items()
            }
            correction, suspects = self.false_negatives.corrections(gathered, study, self.current_epoch)
            terms = contrastive_loss(
                image, text, scale, targets=correction.targets, text_targets=correction.text_targets,
                denominator=correction.denominator, chunk=self.chunk,
            )  # fmt: skip
            pairs = max(1, len(study) * (len(study) - 1))
            terms |= {"suspected_share": correction.suspected / pairs, "corrected_share": correction.corrected / pairs}
            terms |= {"suspected_pairs": correction.suspected.float(), "corrected_pairs": correction.corrected.float()}
            self._watch(suspects, batch, study)
        terms["loss"] = terms.pop("total")
        terms["logit_scale"] = scale.detach()
        self.log_terms({name: value.float() for name, value in terms.items()}, "train", len(batch.row))
        return terms["loss"]

    def _watch(self, suspects: Tensor, batch: CTBatch, study: Tensor) -> None:
        """Precision and recall of the suspects against labels: for the log, never for the loss."""
        if batch.labels is None or not batch.labels.shape[1]:
            return
        quality = identification_quality(suspects, gather_with_gradient(batch.labels), study)
        for name in self._quality:
            self._quality[name] += quality[name]

    def on_train_epoch_end(self) -> None:
        """Log the epoch's precision and recall of the identification."""
        hits, suspected, actual = (self._quality[name] for name in ("hits", "suspected", "actual"))
        if suspected:
            self.log("train/false_negative_precision", hits / suspected)
        if actual:
            self.log("train/false_negative_recall", hits / actual)
        self._quality = dict.fromkeys(self._quality, 0.0)

    def validation_step(self, batch: CTBatch, batch_idx: int) -> None:
        """Plain InfoNCE on whole reports, without augmentation."""
        del batch_idx
        image, _ = self.model.encode_volume(batch.volume)
        text = self.model.encode_text(batch.report)
        image, text = gather_with_gradient(image), gather_with_gradient(text)
        study = gather_with_gradient(batch.study)
        terms = contrastive_loss(image, text, self.model.logit_scale.exp(), study=study)
        self.log_terms({"loss": terms["total"]}, "val", len(batch.row))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Hold the temperature within CLIP's bounds: the scale stays in [1, 100]."""
        del outputs, batch, batch_idx
        self.model.clamp_logit_scale()

    def predict_step(self, batch: CTBatch, batch_idx: int) -> dict[str, Tensor]:
        """Image and report features of a batch, both (B, D), unit rows."""
        del batch_idx
        image, _ = self.model.encode_volume(batch.volume)
        return {"image": image, "text": self.model.encode_text(batch.report), "row": batch.row}

    def finish(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Write the dual encoder; report-to-volume recall on CT `val`."""
        assert isinstance(datamodule, CTDataModule)
        if rank() == 0:
            self.model.save(folder / "artefact", self.upstream, datamodule.volume.to_config())
        metrics = last_values(trainer)
        if self.false_negatives is not None:
            metrics["thresholds"] = self.false_negatives.thresholds
        val = datamodule.with_text(datamodule.manifest.split("val"))
        if len(val) > 1:
            found = predict_rows(trainer, self, datamodule.loader(val), list(val.frame.index))
            similarity = (found["text"] @ found["image"].T).numpy()
            codes = val.study_codes()
            metrics |= recall_at_k(similarity, codes, codes, ks=(1, 5, 10))
        return metrics
