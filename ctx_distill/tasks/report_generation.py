"""Stage 4: a report decoder that reads the CT encoder's tokens."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from ctx_distill.data.datamodules import CTDataModule
from ctx_distill.distributed import gather_objects, own_first_rows, rank
from ctx_distill.files import write_text
from ctx_distill.losses.report import IGNORE, report_loss
from ctx_distill.metrics.generation import generation_report
from ctx_distill.models.dual_encoder import DualEncoder
from ctx_distill.models.report_decoder import ReportDecoder
from ctx_distill.tasks.base import TrainedTask, adamw, check_volume_spec, last_values
from ctx_distill.tasks.row_features import RowFeatures
from ctx_distill.tasks.survival import SurvivalSettings
from ctx_distill.text.findings import load_vocabulary, vocabulary_for
from ctx_distill.types import CTBatch


class ReportTask(TrainedTask):
    """A causal decoder with cross-attention to the frozen CT encoder's tokens.

    Args:
        model: folder of the stage-3 artefact.
        source: a Hugging Face causal model that knows cross-attention; None trains a small one from scratch.
        revision: pinned commit of a hub source.
        vocab_size: of the small decoder's WordPiece vocabulary, trained on the `train` reports.
        width: of the small decoder, a multiple of 32.
        layers: of the small decoder.
        dropout: of the small decoder.
        max_length: longest report in tokens.
        beams: of the beam search.
        no_repeat: no group of this many tokens comes twice; 0 allows it.
        vocabulary: findings for the clinical score where the manifest has no label columns.
        optimizer: see `TrainedTask`.
        scheduler: see `TrainedTask`.
        warmup: see `TrainedTask`.
        select: see `TrainedTask`.
        survival: see `TrainedTask`.
    """

    def __init__(
        self,
        model: str,
        source: str | None = None,
        revision: str | None = None,
        vocab_size: int = 2000,
        width: int = 128,
        layers: int = 2,
        dropout: float = 0.1,
        max_length: int = 128,
        beams: int = 1,
        no_repeat: int = 0,
        vocabulary: str = "ct-rate",
        optimizer: OptimizerCallable = adamw,
        scheduler: LRSchedulerCallable | None = None,
        warmup: float = 0.05,
        select: Literal["last", "best"] = "best",
        survival: SurvivalSettings = SurvivalSettings(),
    ) -> None:
        super().__init__(optimizer, scheduler, warmup, select, survival)
        dual, self.artefact = DualEncoder.load(Path(model))
        self.encoder = dual.ct_encoder.requires_grad_(False)
        self.decoder_source, self.decoder_revision = source, revision
        self.sizes: dict[str, Any] = {"vocab_size": vocab_size, "width": width, "layers": layers, "dropout": dropout}
        self.max_length, self.beams, self.no_repeat = max_length, beams, no_repeat
        self.vocabulary = vocabulary
        self.decoder: ReportDecoder | None = None
        self._tokens = RowFeatures()

    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Make the decoder; its vocabulary comes from the `train` reports alone. Then train."""
        assert isinstance(datamodule, CTDataModule)
        check_volume_spec(self.artefact, datamodule)
        width = self.encoder.embed_dim
        train = datamodule.training_rows()
        with torch.no_grad():
            volume = datamodule.dataset(train)[0].tensor[None].float()  # a prepared one holds int16 steps
            places = self.encoder(volume).tokens.shape[1]
        if self.decoder_source is not None:
            self.decoder = ReportDecoder.from_pretrained(
                self.decoder_source, width, places, self.decoder_revision, self.max_length
            )
        else:
            texts = [train.report(row) for row in train.frame.index]
            with tempfile.TemporaryDirectory() as scratch:
                self.decoder = ReportDecoder.from_scratch(
                    texts, Path(scratch), width, places, max_length=self.max_length, **self.sizes
                )
        return super().run(trainer, datamodule, folder)

    def _ct_tokens(self, batch: CTBatch) -> Tensor:
        """(B, T, D_c), computed once a volume, since the encoder is frozen."""
        return self._tokens(batch.row.tolist(), lambda new: self._frozen(batch.volume[new])).to(batch.volume.device)

    @torch.no_grad()
    def _frozen(self, volume: Tensor) -> Tensor:
        self.encoder.eval()
        tokens: Tensor = self.encoder(volume).tokens
        return tokens

    def _loss(self, batch: CTBatch) -> Tensor:
        assert self.decoder is not None
        logits, targets = self.decoder(self._ct_tokens(batch), **self.decoder.tokenize(batch.report))
        repeated = ~own_first_rows(batch.row)
        return report_loss(logits, targets.masked_fill(repeated[:, None], IGNORE))["total"]

    def training_step(self, batch: CTBatch, batch_idx: int) -> Tensor:
        """Cross-entropy of the next token."""
        del batch_idx
        loss = self._loss(batch)
        self.log_terms({"loss": loss}, "train", self.global_rows(batch.row))
        return loss

    def validation_step(self, batch: CTBatch, batch_idx: int) -> None:
        """The same."""
        del batch_idx
        self.log_terms({"loss": self._loss(batch)}, "val", self.global_rows(batch.row))

    def predict_step(self, batch: CTBatch, batch_idx: int) -> dict[str, Any]:
        """Generated reports of a batch."""
        del batch_idx
        assert self.decoder is not None
        texts = self.decoder.generate(
            self._ct_tokens(batch),
            max_new_tokens=self.max_length,
            num_beams=self.beams,
            no_repeat_ngram_size=self.no_repeat,
        )
        return {"row": batch.row.tolist(), "text": texts}

    def finish(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Write the decoder; write and score the reports of the `test` studies."""
        assert isinstance(datamodule, CTDataModule)
        assert self.decoder is not None
        if rank() == 0:
            self.decoder.save(folder / "artefact", {"dual-encoder": self.artefact.fingerprint})
        metrics = last_values(self)
        test = datamodule.with_text(datamodule.manifest.split("test"))
        test = test.where(~test.frame["study_id"].duplicated().to_numpy())
        outputs: list[Any] = trainer.predict(self, dataloaders=datamodule.loader(test)) or [] if len(test) else []
        pairs = [pair for output in outputs for pair in zip(output["row"], output["text"], strict=True)]
        generated = dict(gather_objects(pairs))
        rows = [int(row) for row in test.frame.index]
        references, hypotheses = [test.report(row) for row in rows], [generated[row] for row in rows]
        table = pd.DataFrame({"study_id": test.frame["study_id"], "reference": references, "generated": hypotheses})
        if rank() == 0:
            write_text(folder / "reports.csv", table.to_csv(index=False, lineterminator="\n"))
        names = datamodule.manifest.finding_names
        vocabulary = vocabulary_for(names) if names else load_vocabulary(self.vocabulary)
        patients = test.frame["patient_id"].tolist()
        return metrics | {"studies": len(test)} | generation_report(references, hypotheses, patients, vocabulary)
