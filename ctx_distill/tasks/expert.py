"""A small X-ray expert of one's own: a CLIP on radiograph-report pairs, saved as an open_clip model."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from ctx_distill.data.augment import Augmentation
from ctx_distill.data.datamodules import XrayDataModule
from ctx_distill.data.manifest import Manifest
from ctx_distill.distributed import barrier, gather_with_gradient, rank
from ctx_distill.errors import InputError
from ctx_distill.losses.contrastive import contrastive_loss
from ctx_distill.metrics.classification import classification_report
from ctx_distill.models.experts.open_clip_expert import expert_preprocessing, make_expert_folder, save_expert_folder
from ctx_distill.models.xray_expert import open_expert
from ctx_distill.tasks.base import LARGEST_LOGIT_SCALE, TrainedTask, adamw, last_values
from ctx_distill.tasks.predict import predict_rows, study_means
from ctx_distill.tasks.prompting import pair_probabilities, prompt_features
from ctx_distill.text.report import sample_sentences
from ctx_distill.types import XrayBatch


class ExpertTask(TrainedTask):
    """InfoNCE between radiographs and random sentence subsets of their reports.

    Args:
        image_size: height and width in pixels.
        embed_dim: D_e.
        vision: image tower, see `make_expert_folder`.
        text_width: of the text transformer.
        text_layers: of the text transformer.
        context_length: tokens.
        vocab_size: of the WordPiece vocabulary, trained on the `train` reports.
        subset_share: share of steps in which a report is cut to a random subset of its sentences, down to one.
        augmentation: of the radiographs.
        optimizer: see `TrainedTask`.
        scheduler: see `TrainedTask`.
        warmup: see `TrainedTask`.
        select: see `TrainedTask`.
    """

    def __init__(
        self,
        image_size: int = 96,
        embed_dim: int = 128,
        vision: Literal["regnet", "resnet", "vit", "resnet50"] = "resnet",
        text_width: int = 128,
        text_layers: int = 2,
        context_length: int = 64,
        vocab_size: int = 2000,
        subset_share: float = 0.75,
        augmentation: Augmentation = Augmentation(),
        optimizer: OptimizerCallable = adamw,
        scheduler: LRSchedulerCallable | None = None,
        warmup: float = 0.05,
        select: Literal["last", "best"] = "last",
    ) -> None:
        super().__init__(optimizer, scheduler, warmup, select)
        self.sizes: dict[str, Any] = {
            "image_size": image_size, "embed_dim": embed_dim, "vision": vision, "text_width": text_width,
            "text_layers": text_layers, "context_length": context_length, "vocab_size": vocab_size,
        }  # fmt: skip
        self.subset_share, self.augmentation = subset_share, augmentation
        self.model: Any = None

    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Build the model with a vocabulary of the `train` reports, train, write the expert."""
        assert isinstance(datamodule, XrayDataModule)
        datamodule.text = "required"
        train = datamodule.training_rows()
        texts = [train.report(row) for row in train.frame.index]
        if not texts:
            raise InputError(f"{datamodule.manifest.path}: no `train` X-ray has a report; an expert cannot be trained.")
        with tempfile.TemporaryDirectory() as scratch:
            self.model, self.tokenizer, self.config = make_expert_folder(Path(scratch), texts, **self.sizes)
        datamodule.preprocess = expert_preprocessing(self.config)
        datamodule.preprocess_key = f"expert-{self.sizes['image_size']}"
        return super().run(trainer, datamodule, folder)

    def _view(self, row: int, report: str) -> str:
        rng = random.Random(f"{self.current_epoch}-{row}")
        return sample_sentences(report, rng) if rng.random() < self.subset_share else report

    def _loss(self, image: Tensor, reports: list[str], study: Tensor) -> dict[str, Tensor]:
        image_features = self.model.encode_image(image, normalize=True)
        text_features = self.model.encode_text(self.tokenizer(reports).to(self.device), normalize=True)
        terms = contrastive_loss(
            gather_with_gradient(image_features),
            gather_with_gradient(text_features),
            self.model.logit_scale.exp(),
            study=gather_with_gradient(study),
        )
        return {"loss": terms["total"]}

    def training_step(self, batch: XrayBatch, batch_idx: int) -> Tensor:
        """InfoNCE of a batch."""
        del batch_idx
        views = [self._view(row, report) for row, report in zip(batch.row.tolist(), batch.report, strict=True)]
        terms = self._loss(self.augmentation(batch.image), views, batch.study)
        self.log_terms(terms, "train", len(batch.row))
        return terms["loss"]

    def validation_step(self, batch: XrayBatch, batch_idx: int) -> None:
        """The same on whole reports, without augmentation."""
        del batch_idx
        self.log_terms(self._loss(batch.image, batch.report, batch.study), "val", len(batch.row))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Hold the temperature within CLIP's bounds."""
        del outputs, batch, batch_idx
        with torch.no_grad():
            self.model.logit_scale.clamp_(0.0, LARGEST_LOGIT_SCALE)

    def predict_step(self, batch: XrayBatch, batch_idx: int) -> dict[str, Tensor]:
        """Image features (B, D_e), unit rows."""
        del batch_idx
        return {"image": F.normalize(self.model.encode_image(batch.image), dim=-1), "row": batch.row}

    def finish(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Write the expert; ask it about the X-ray `test` studies, where there are labels."""
        assert isinstance(datamodule, XrayDataModule)
        target = folder / "artefact"
        if rank() == 0:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                save_expert_folder(self.model, self.config, self.tokenizer, Path(scratch) / "expert")
                shutil.rmtree(target, ignore_errors=True)
                (Path(scratch) / "expert").rename(target)
        barrier()
        metrics = last_values(trainer) | {"macro_auroc": None}
        test = datamodule.manifest.split("test")
        if len(test) and test.finding_names:
            metrics |= self._ask(trainer, datamodule, test, target)
        return metrics

    def _ask(self, trainer: L.Trainer, datamodule: XrayDataModule, test: Manifest, folder: Path) -> dict[str, Any]:
        found = predict_rows(trainer, self, datamodule.loader(test), list(test.frame.index))
        expert = open_expert(str(folder))
        names = list(test.finding_names)
        positive, negative = prompt_features(expert.encode_text, names, "ensemble")
        scores = pair_probabilities(found["image"], positive, negative, expert.logit_scale or 1.0)
        studies, means = study_means(test, scores.numpy())
        labels = studies[[f"label:{name}" for name in names]].to_numpy()
        return classification_report(labels, means, names, studies["patient_id"].tolist())
