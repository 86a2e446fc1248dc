"""Train a small X-ray expert: a CLIP model on radiograph-report pairs, saved as an open_clip model."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pandas as pd
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from ctx_distill.data.loading.datamodules import XrayDataModule
from ctx_distill.data.manifests.manifest import Manifest
from ctx_distill.data.transforms.augment import Augmentation
from ctx_distill.distributed import gather_row_counts, gather_with_gradient, rank, run_on_rank_zero, world_size
from ctx_distill.errors import InputError
from ctx_distill.files import replace_folder
from ctx_distill.losses.contrastive import contrastive_loss
from ctx_distill.metrics.classification import classification_report
from ctx_distill.models.experts.open_clip_expert import expert_preprocessing, make_expert_folder, save_expert_folder
from ctx_distill.models.opening import open_expert
from ctx_distill.run_files import ARTEFACT
from ctx_distill.seeds import run_seed, seed_of
from ctx_distill.stages.shared.prompt_scores import pair_probabilities, prompt_features
from ctx_distill.stages.shared.report_views import report_views
from ctx_distill.stages.shared.vocabulary_texts import vocabulary_texts
from ctx_distill.text.report_text import sample_sentences
from ctx_distill.training.base_task import LARGEST_LOGIT_SCALE, TrainedTask, adamw, last_values
from ctx_distill.training.fault_tolerance import SurvivalSettings
from ctx_distill.training.predictions import predict_rows, study_means
from ctx_distill.types import XrayBatch


class ExpertTask(TrainedTask):
    """Train a CLIP model with InfoNCE between radiographs and random sentence subsets of their reports.

    Args:
        image_size: Height and width in pixels.
        embed_dim: D_e.
        vision: Image tower; see `make_expert_folder`.
        text_width: Width of the text transformer.
        text_layers: Layers of the text transformer.
        context_length: Context length in tokens.
        vocab_size: Size of the WordPiece vocabulary, which is trained on the `train` reports.
        subset_share: Probability that a step reduces a report to a random subset of its sentences, at least one.
        section_weight: Weight of a second InfoNCE term between a report's findings and its impression, which describe
            the same study in different words (CXR-CLIP, You et al. 2023, also has a text-text term); 0 disables it.
        read_ct_reports: Add the findings and impressions of the CT `train` reports to the second InfoNCE term and to
            the vocabulary, so that the text tower also learns the language of CT reports.
        report_corpus: CSV with the columns `findings` and `impression`: further reports without images, of any
            modality, used in addition to, or instead of, those of `read_ct_reports`.
        augmentation: Augmentation of the radiographs.
        optimizer: See `TrainedTask`.
        scheduler: See `TrainedTask`.
        warmup: See `TrainedTask`.
        select: See `TrainedTask`.
        survival: See `TrainedTask`.
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
        section_weight: float = 0.5,
        read_ct_reports: bool = True,
        report_corpus: str | None = None,
        augmentation: Augmentation = Augmentation(),
        optimizer: OptimizerCallable = adamw,
        scheduler: LRSchedulerCallable | None = None,
        warmup: float = 0.05,
        select: Literal["last", "best"] = "last",
        survival: SurvivalSettings = SurvivalSettings(),
    ) -> None:
        super().__init__(optimizer, scheduler, warmup, select, survival)
        self.sizes: dict[str, Any] = {
            "image_size": image_size, "embed_dim": embed_dim, "vision": vision, "text_width": text_width,
            "text_layers": text_layers, "context_length": context_length, "vocab_size": vocab_size,
        }  # fmt: skip
        self.subset_share, self.section_weight = subset_share, section_weight
        self.augmentation = augmentation
        self.read_ct_reports = read_ct_reports
        self.report_corpus = report_corpus
        self._sections: dict[int, tuple[str, str]] = {}
        self._reports: list[tuple[int, str, str]] = []
        """Study code, findings and impression of the reports without X-rays: CT `train` and `report_corpus`."""
        self._excluded: dict[str, int] = {}
        self.model: Any = None

    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Build the model with a vocabulary trained on the `train` reports, train it and save the expert."""
        assert isinstance(datamodule, XrayDataModule)
        datamodule.text = "required"
        train = datamodule.training_rows()
        if not len(train):
            raise InputError(
                f"{datamodule.manifest.path}: no `train` X-ray has a report; expected at least one. Add report texts to "
                "the manifest, or use a published expert."
            )
        self._excluded = datamodule.excluded()
        self._print_excluded()
        manifests = [train]
        self._sections = sections_of(train)
        ct_train, _ = datamodule.ct_reports()
        if self.read_ct_reports and ct_train is not None:
            manifests.append(ct_train)
            codes = dict(zip(ct_train.rows.tolist(), ct_train.study_codes().tolist(), strict=True))
            self._reports = [(codes[row], *pair) for row, pair in sections_of(ct_train).items()]
        corpus = [] if self.report_corpus is None else read_corpus(Path(self.report_corpus))
        first = max((code for code, _, _ in self._reports), default=-1) + 1
        self._reports += [(code, *pair) for code, pair in enumerate(corpus, start=first)]
        texts = vocabulary_texts(*manifests, more=[" ".join(pair) for pair in corpus])
        with tempfile.TemporaryDirectory() as scratch:
            self.model, self.tokenizer, self.config = make_expert_folder(
                Path(scratch), texts, seed=run_seed(), **self.sizes
            )
        datamodule.preprocess = expert_preprocessing(self.config)
        datamodule.preprocess_key = f"expert-{self.sizes['image_size']}"
        return super().run(trainer, datamodule, folder)

    def _print_excluded(self) -> None:
        if rank() == 0:
            for reason, count in self._excluded.items():
                if count:
                    print(f"expert: excluded {count} rows ({reason})")

    def _text(self, reports: list[str]) -> Tensor:
        """Return unit rows (b, D); an empty batch still has a gradient, because all ranks must gather alike."""
        if not reports:
            scale = self.model.logit_scale
            nothing: Tensor = (scale * scale.new_zeros(0, self.sizes["embed_dim"])).float()
            return nothing
        features: Tensor = self.model.encode_text(self.tokenizer(reports).to(self.device), normalize=True)
        return features

    def _image_to_report(self, image: Tensor, reports: list[str], batch: XrayBatch) -> tuple[Tensor, int]:
        """Return InfoNCE over the global batch, and the number of rows."""
        features = self.model.encode_image(image, normalize=True)
        features, text, study = self.gather_once(batch.row, features, self._text(reports), batch.study)
        return contrastive_loss(features, text, self.model.logit_scale.exp(), study=study)["total"], len(study)

    def _section_to_section(self, batch: XrayBatch, batch_idx: int) -> Tensor | None:
        """Return InfoNCE between findings and impressions of the batch's studies and of as many other reports.

        The draws depend on the row and on the position in the global batch, not on the rank. Images of one study are
        positives of each other, as in the image-report term.
        """
        epoch, rows = self.current_epoch, batch.row.tolist()
        codes = dict(zip(rows, batch.study.tolist(), strict=True))
        local = [
            (codes[row], *self._sections[row], seed_of(epoch, row, "sections")) for row in rows if row in self._sections
        ]
        wanted = min(len(rows) * world_size(), len(self._reports))
        drawn = random.Random(seed_of(epoch, batch_idx, "CT sections")).sample(self._reports, wanted)
        # X-ray studies have codes from 0 up, other reports have codes below 0, so that they never count as one study.
        others: list[tuple[int, str, str, int]] = [
            (-1 - code, findings, impression, seed_of(epoch, batch_idx, "CT sections", n))
            for n, (code, findings, impression) in enumerate(drawn)
        ]
        local += others[rank() :: world_size()]
        if sum(gather_row_counts(len(local), self.device)) < 2:
            return None
        findings = self._text([sample_sentences(text, random.Random(seed)) for _, text, _, seed in local])
        impressions = self._text([impression for _, _, impression, _ in local])
        study = torch.tensor([code for code, *_ in local], dtype=torch.int64, device=findings.device)
        scale = self.model.logit_scale.exp()
        return contrastive_loss(
            gather_with_gradient(findings), gather_with_gradient(impressions), scale, study=gather_with_gradient(study)
        )["total"]

    def training_step(self, batch: XrayBatch, batch_idx: int) -> Tensor:
        """Return InfoNCE between radiographs and reports, plus the weighted term between report sections."""
        views = report_views(batch.report, self.row_seeds(batch.row, "view"), self.subset_share)
        image = self.augmentation.apply(batch.image, self.row_seeds(batch.row))
        contrast, count = self._image_to_report(image, views, batch)
        terms = {"image_to_report": contrast}
        terms["loss"] = terms["image_to_report"]
        sections = self._section_to_section(batch, batch_idx) if self.section_weight else None
        if sections is not None:
            terms["section_to_section"] = sections
            terms["loss"] = terms["loss"] + self.section_weight * sections
        self.log_terms(terms, "train", count)
        return terms["loss"]

    def validation_step(self, batch: XrayBatch, batch_idx: int) -> None:
        """Log the image-report loss on complete reports, without augmentation."""
        del batch_idx
        loss, count = self._image_to_report(batch.image, batch.report, batch)
        self.log_terms({"loss": loss}, "val", count)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Clamp the temperature to CLIP's bounds."""
        del outputs, batch, batch_idx
        with torch.no_grad():
            self.model.logit_scale.clamp_(0.0, LARGEST_LOGIT_SCALE)

    def predict_step(self, batch: XrayBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return image features (B, D_e), unit rows."""
        del batch_idx
        return {"image": F.normalize(self.model.encode_image(batch.image), dim=-1), "row": batch.row}

    def _save(self, target: Path) -> None:
        """Save the expert atomically: write a temporary folder and move it to `target`."""
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            save_expert_folder(self.model, self.config, self.tokenizer, Path(scratch) / "expert")
            replace_folder(Path(scratch) / "expert", target)

    def finish(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Save the expert, and evaluate it on the X-ray `test` studies if they have labels."""
        assert isinstance(datamodule, XrayDataModule)
        target = folder / ARTEFACT
        run_on_rank_zero(lambda: self._save(target))
        metrics = last_values(self) | {"macro_auroc": None, "left_out": self._excluded}
        test = datamodule.manifest.split("test")
        if len(test) and test.finding_names:
            metrics |= self._evaluate(trainer, datamodule, test, target)
        return metrics

    def _evaluate(self, trainer: L.Trainer, datamodule: XrayDataModule, test: Manifest, folder: Path) -> dict[str, Any]:
        predictions = predict_rows(trainer, self, datamodule.loader(test), list(test.frame.index))
        expert = open_expert(str(folder))
        names = list(test.finding_names)
        positive, negative = prompt_features(expert.encode_text, names, "normal")
        scores = pair_probabilities(predictions["image"], positive, negative, expert.logit_scale or 1.0)
        studies, means = study_means(test, scores.numpy())
        labels = studies[[f"label:{name}" for name in names]].to_numpy()
        return classification_report(labels, means, names, studies["patient_id"].tolist())


def read_corpus(path: Path) -> list[tuple[str, str]]:
    """Return findings and impression of the reports of a CSV that have both.

    Raises:
        InputError: The file does not exist, or a column is missing.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such report corpus; expected a CSV with columns findings and impression.")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if missing := sorted({"findings", "impression"} - set(table.columns)):
        raise InputError(f"{path}: missing column {missing[0]!r}; expected the columns findings and impression.")
    return [pair for pair in zip(table["findings"], table["impression"], strict=True) if all(pair)]


def sections_of(manifest: Manifest) -> dict[int, tuple[str, str]]:
    """Return findings and impression by row, for the rows that have both."""
    columns = zip(manifest.rows.tolist(), *(manifest.column(name) for name in ("findings", "impression")), strict=True)
    return {row: (findings, impression) for row, findings, impression in columns if findings and impression}
