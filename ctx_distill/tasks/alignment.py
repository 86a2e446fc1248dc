"""Stage 3: robust contrastive alignment of CT and report, from the stage-2 weights (method, stage 3)."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
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
from ctx_distill.models.dual_encoder import DualEncoder, load_ct_encoder
from ctx_distill.models.heads import ProjectionHead
from ctx_distill.models.text_encoder import BertTextEncoder, ExpertTextEncoder, TextEncoder
from ctx_distill.retrieval.lookup import NeighbourLookup
from ctx_distill.tasks.base import LARGEST_LOGIT_SCALE, TrainedTask, adamw, decay_groups, last_values
from ctx_distill.tasks.false_negatives import FalseNegatives, RobustSettings
from ctx_distill.tasks.predict import predict_rows
from ctx_distill.tasks.teacher import open_teacher
from ctx_distill.text.report import sample_sentences
from ctx_distill.types import CTBatch


@dataclass(frozen=True)
class TextSettings:
    """The report tower.

    Attributes:
        tower: `expert`: a copy of the X-ray expert's text tower, in whose space the student already lies; `bert`: any
            BERT-like folder or hub repository; `scratch`: a small BERT whose WordPiece vocabulary is trained on the
            manifest's `train` reports.
        trainable: whether it learns.
        lr_factor: of its learning rate, against that of the CT encoder.
        source: of `bert`.
        revision: pinned commit of a hub source.
        width: of `scratch`.
        layers: of `scratch`.
        vocab_size: of `scratch`.
        context_length: tokens of `bert` and `scratch`.
        projection_dim: width of the joint space; None keeps the text tower's own.
    """

    tower: Literal["expert", "bert", "scratch"] = "expert"
    trainable: bool = True
    lr_factor: float = 1.0
    source: str | None = None
    revision: str | None = None
    width: int = 128
    layers: int = 2
    vocab_size: int = 2000
    context_length: int = 256
    projection_dim: int | None = None


class AlignmentTask(TrainedTask):
    """InfoNCE over the global batch with corrected false negatives.

    Args:
        expert: folder or hub name of the X-ray expert: its frozen text tower gives the evidence.
        index: folder of the stage-1 artefact.
        text: the report tower.
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
        text: TextSettings = TextSettings(),
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
        teacher, store = open_teacher(expert, expert_revision, index)
        self._teacher = (teacher,)
        self.lookup = NeighbourLookup(store, min(neighbours, len(store)), "mean")
        self.student_spec: str | None = None
        self.upstream = {"xray-expert": teacher.fingerprint(), "xray-index": store.fingerprint}
        projection = None
        if student is not None:
            encoder, projection = self._take_student(student)
        elif encoder is None:
            raise InputError("stage 3 got neither a student nor an encoder. Run make stage-2, or give `encoder`.")
        self.ct_encoder, self.image_projection = encoder, projection
        self.text = text
        # A student already lies in the expert's space; an encoder that starts from nothing would overfit at its scale.
        self.scale = (teacher.logit_scale if student is not None else None) or 1 / 0.07
        self.text_source = (expert, expert_revision)
        self.model: DualEncoder | None = None
        self.robust, self.subset_share = robust, subset_share
        self.augmentation, self.chunk = augmentation, chunk
        self.false_negatives: FalseNegatives | None = None
        self._quality = {"hits": 0.0, "suspected": 0.0, "actual": 0.0}

    def _take_student(self, student: str) -> tuple[CTEncoder, ProjectionHead]:
        """Encoder and projection of a stage-2 artefact, after checking what it was made from."""
        encoder, projection, artefact = load_ct_encoder(Path(student))
        for what, name in (("expert", "xray-expert"), ("index", "xray-index")):
            require_same(
                f"the {what} given to stage 3", self.upstream[name],
                f"the {what} that the student {student} was distilled from", artefact.upstream[name],
                "Run make stage-2 again, or give the one that it was distilled from.",
            )  # fmt: skip
        self.student_spec = hash_json(artefact.config["volume_spec"])
        self.upstream["ct-encoder"] = artefact.fingerprint
        return encoder, projection

    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Join the two encoders, then train."""
        assert isinstance(datamodule, CTDataModule)
        text_encoder = self._text_encoder(datamodule)
        space = self.text.projection_dim or text_encoder.embed_dim
        projection = self.image_projection
        if projection is not None and projection.config["out_dim"] != space:
            projection = None
        self.model = DualEncoder(self.ct_encoder, text_encoder, self.text.projection_dim, projection, self.scale)
        return super().run(trainer, datamodule, folder)

    def _text_encoder(self, datamodule: CTDataModule) -> TextEncoder:
        text = self.text
        if text.tower == "expert":
            return ExpertTextEncoder.from_expert(*self.text_source, trainable=text.trainable)
        if text.tower == "bert":
            if text.source is None:
                raise InputError("stage 3: text.tower is bert, but text.source names no folder or hf-hub: repository.")
            return BertTextEncoder.from_pretrained(text.source, text.revision, text.context_length, text.trainable)
        train = datamodule.training_rows()
        reports = [train.report(row) for row in train.frame.index]
        with tempfile.TemporaryDirectory() as scratch:
            return BertTextEncoder.from_scratch(
                reports, Path(scratch), text.vocab_size, text.width, text.layers, text.context_length
            )

    @property
    def dual(self) -> DualEncoder:
        """The dual encoder, once `run` has joined it."""
        assert self.model is not None
        return self.model

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
            torch.tensor(train.study_codes()),
            [train.report(row) for row in train.frame.index],
            self._teacher[0].to(self.trainer.strategy.root_device),
            self.lookup,
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The text tower in groups of its own, by its `lr_factor`."""
        text = list(self.dual.text_encoder.parameters())
        own = [{**group, "lr_factor": self.text.lr_factor} for group in decay_groups(self.dual.text_encoder)]
        return [*decay_groups(self, without=text), *own]

    def _views(self, batch: CTBatch) -> list[str]:
        """This epoch's view of each report: a function of epoch and row alone."""
        views = []
        for row, report in zip(batch.row.tolist(), batch.report, strict=True):
            rng = random.Random(f"{self.current_epoch}-{row}")
            views.append(sample_sentences(report, rng) if rng.random() < self.subset_share else report)
        return views

    def _encode(self, batch: CTBatch) -> tuple[Tensor, Tensor]:
        """Features of this rank's rows, both (b, D), of augmented volumes and of this epoch's views of the reports."""
        image, _ = self.dual.encode_volume(self.augmentation(batch.volume))
        return image, self.dual.encode_text(self._views(batch))

    def _contrast(self, image: Tensor, text: Tensor, batch: CTBatch) -> dict[str, Tensor]:
        """The contrastive terms of the global batch, `loss` among them, from this rank's features."""
        study = gather_with_gradient(batch.study)
        image, text = gather_with_gradient(image), gather_with_gradient(text)
        scale = self.dual.logit_scale.exp()
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
        return terms

    def training_step(self, batch: CTBatch, batch_idx: int) -> Tensor:
        """InfoNCE with corrected targets over the global batch."""
        del batch_idx
        image, text = self._encode(batch)
        terms = self._contrast(image, text, batch)
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
        image, _ = self.dual.encode_volume(batch.volume)
        text = self.dual.encode_text(batch.report)
        image, text = gather_with_gradient(image), gather_with_gradient(text)
        study = gather_with_gradient(batch.study)
        terms = contrastive_loss(image, text, self.dual.logit_scale.exp(), study=study)
        self.log_terms({"loss": terms["total"]}, "val", len(batch.row))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Hold the temperature within CLIP's bounds: the scale stays in [1, 100]."""
        del outputs, batch, batch_idx
        with torch.no_grad():
            self.dual.logit_scale.clamp_(0.0, LARGEST_LOGIT_SCALE)

    def predict_step(self, batch: CTBatch, batch_idx: int) -> dict[str, Tensor]:
        """Image and report features of a batch, both (B, D), unit rows."""
        del batch_idx
        image, _ = self.dual.encode_volume(batch.volume)
        return {"image": image, "text": self.dual.encode_text(batch.report), "row": batch.row}

    def finish(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Write the dual encoder; report-to-volume recall on CT `val`."""
        assert isinstance(datamodule, CTDataModule)
        if rank() == 0:
            self.dual.save(folder / "artefact", self.upstream, datamodule.volume.to_config())
        metrics = last_values(trainer)
        if self.false_negatives is not None:
            metrics["thresholds"] = self.false_negatives.thresholds
        val = datamodule.with_text(datamodule.manifest.split("val"))
        if len(val) > 1:
            found = predict_rows(trainer, self, datamodule.loader(val), list(val.frame.index))
            similarity = (found["text"] @ found["image"].T).numpy()
            codes = val.study_codes()
            metrics |= recall_at_k(similarity, codes, codes, ks=(1, 5, 10))
            metrics["recall_at_5_random"] = min(1.0, 5 / len(val))
        return metrics
