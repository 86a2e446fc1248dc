"""Stage 4: train a report decoder with cross-attention to the CT encoder's tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.manifests.manifest import Manifest
from ctx_distill.distributed import gather_objects, own_first_rows, rank, run_on_rank_zero
from ctx_distill.files import write_text
from ctx_distill.metrics.report_baselines import beside_baselines, most_frequent_report, nearest_reports
from ctx_distill.metrics.report_extras import Extra, extra_scores
from ctx_distill.models.decoder_artefact import save_decoder
from ctx_distill.models.decoder_sources import pretrained_decoder, small_decoder
from ctx_distill.models.dual_encoder import DualEncoder
from ctx_distill.models.lora import LoraSettings
from ctx_distill.models.report_decoder import ReportDecoder
from ctx_distill.models.sampling import SamplingSettings
from ctx_distill.run_files import ARTEFACT, REPORTS
from ctx_distill.stages.report.loss import IGNORE, report_loss
from ctx_distill.text.extractor import load_vocabulary, vocabulary_for
from ctx_distill.training.base_task import TrainedTask, adamw, check_volume_spec, last_values
from ctx_distill.training.fault_tolerance import SurvivalSettings
from ctx_distill.training.row_features import CacheSettings, RowFeatures
from ctx_distill.types import CTBatch, InputError


class ReportTask(TrainedTask):
    """Train a causal decoder on the frozen CT encoder's tokens, and compare it with retrieval and constant baselines.

    Args:
        model: Folder of the stage-3 artefact.
        source: a Hugging Face causal model (folder or `hf-hub:organisation/name`); None trains a small one from scratch.
        revision: Pinned commit of a hub source.
        vocab_size: Of the small decoder's WordPiece vocabulary, trained on the `train` reports.
        width: Of the small decoder, a multiple of 32.
        layers: Of the small decoder.
        dropout: Of the small decoder.
        max_length: Maximum report length in tokens.
        beams: Beams of the beam search.
        no_repeat: n-grams of this many tokens may not repeat; 0 disables it.
        min_length: Minimum report length in tokens.
        length_penalty: Exponent of the length by which a beam's score is divided.
        sampling: Sample tokens instead of choosing the most probable; a study's samples do not depend on other studies.
        lora: Train only LoRA adapters of `source`, for large models.
        extras: Scores that need Java or model weights: meteor, radgraph, chexbert, green.
        vocabulary: Findings of the clinical score if the manifest has no label columns.
        cache: Cache of the frozen encoder's tokens: 4 D_c bytes per token, 21 MB per volume with the preset `base`.
        optimizer: See `TrainedTask`.
        scheduler: See `TrainedTask`.
        warmup: See `TrainedTask`.
        select: See `TrainedTask`.
        survival: See `TrainedTask`.
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
        min_length: int = 0,
        length_penalty: float = 1.0,
        sampling: SamplingSettings | None = None,
        lora: LoraSettings | None = None,
        extras: Sequence[Extra] = (),
        vocabulary: str = "ct-rate",
        cache: CacheSettings = CacheSettings(),
        optimizer: OptimizerCallable = adamw,
        scheduler: LRSchedulerCallable | None = None,
        warmup: float = 0.05,
        select: Literal["last", "best"] = "best",
        survival: SurvivalSettings = SurvivalSettings(),
    ) -> None:
        super().__init__(optimizer, scheduler, warmup, select, survival)
        dual, self.artefact = DualEncoder.load(Path(model))
        self.encoder = dual.ct_encoder.requires_grad_(False)
        self.image_projection = dual.image_projection.requires_grad_(False)
        self.decoder_source, self.decoder_revision = source, revision
        self.sizes: dict[str, Any] = {"vocab_size": vocab_size, "width": width, "layers": layers, "dropout": dropout}
        self.max_length, self.beams, self.no_repeat = max_length, beams, no_repeat
        self.min_length, self.length_penalty, self.sampling = min_length, length_penalty, sampling
        if lora is not None and source is None:
            raise InputError(
                "report: lora is set but source is not; LoRA needs a pretrained model. Set source, or remove lora."
            )
        self.strict_loading = lora is None  # with LoRA, checkpoints contain trainable weights only
        self.lora, self.extras = lora, tuple(extras)
        self.vocabulary = vocabulary
        self._writes = True
        self.decoder: ReportDecoder | None = None
        self._tokens = RowFeatures(cache)

    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Build the decoder, with a vocabulary from the `train` reports only, then train it."""
        assert isinstance(datamodule, CTDataModule)
        check_volume_spec(self.artefact, datamodule)
        width = self.encoder.embed_dim
        train = datamodule.training_rows()
        with torch.no_grad():
            volume = datamodule.dataset(train)[0].tensor[None].float()  # a prepared one holds int16 steps
            places = self.encoder(volume).tokens.shape[1]
        if self.decoder_source is not None:
            self.decoder = pretrained_decoder(
                self.decoder_source, width, places, self.decoder_revision, self.max_length, self.lora
            )
        else:
            texts = [train.report(row) for row in train.frame.index]
            with tempfile.TemporaryDirectory() as scratch:
                self.decoder = small_decoder(
                    texts, Path(scratch), width, places, max_length=self.max_length, **self.sizes
                )
        try:
            return super().run(trainer, datamodule, folder)
        finally:
            self._tokens.close()

    def setup(self, stage: str) -> None:
        """Open the disk cache for the volumes of `train` and `val`, which are used in every epoch."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and isinstance(datamodule, CTDataModule):
            val = datamodule.with_text(datamodule.manifest.split("val"))
            self._tokens.open_disk(self.trainer, [*datamodule.training_rows().frame.index, *val.frame.index])

    def on_train_epoch_end(self) -> None:
        """Log the epoch means, and once the size of the token cache."""
        super().on_train_epoch_end()
        self._tokens.report_once("report: tokens of CT volumes")

    def _ct_tokens(self, batch: CTBatch) -> Tensor:
        """Return the CT tokens (B, T, D_c), cached because the encoder is frozen."""
        return self._outputs(batch)[:, 1:]

    def _outputs(self, batch: CTBatch) -> Tensor:
        """Return the encoder's pooled vector followed by its tokens, (B, 1 + T, D_c)."""
        outputs = self._tokens.get(batch.row.tolist(), lambda new: self._frozen(batch.volume[new]))
        return outputs.to(batch.volume.device)

    @torch.no_grad()
    def _frozen(self, volume: Tensor) -> Tensor:
        self.encoder.eval()
        output = self.encoder(volume)
        return torch.cat([output.pooled[:, None], output.tokens], dim=1)

    @torch.no_grad()
    def _embedding(self, batch: CTBatch) -> Tensor:
        """Return the aligned model's image features without the projection prior, (B, D) unit rows."""
        self.image_projection.eval()
        return torch.nn.functional.normalize(self.image_projection(self._outputs(batch)[:, 0]), dim=-1)

    def _loss(self, batch: CTBatch) -> Tensor:
        assert self.decoder is not None
        logits, targets = self.decoder(self._ct_tokens(batch), **self.decoder.tokenize(batch.report))
        repeated = ~own_first_rows(batch.row)
        return report_loss(logits, targets.masked_fill(repeated[:, None], IGNORE))["total"]

    def training_step(self, batch: CTBatch, batch_idx: int) -> Tensor:
        """Return the next-token cross-entropy."""
        del batch_idx
        loss = self._loss(batch)
        self.log_terms({"loss": loss}, "train", self.global_rows(batch.row))
        return loss

    def validation_step(self, batch: CTBatch, batch_idx: int) -> None:
        """Log the next-token cross-entropy."""
        del batch_idx
        self.log_terms({"loss": self._loss(batch)}, "val", self.global_rows(batch.row))

    def predict_step(self, batch: CTBatch, batch_idx: int) -> dict[str, Any]:
        """Return image embeddings of a batch and, if enabled, generated reports; each row only once over all ranks."""
        del batch_idx
        assert self.decoder is not None
        first = own_first_rows(batch.row).nonzero().flatten()
        rows = batch.row[first].tolist()
        texts = [""] * len(rows)
        if self._writes and rows:
            texts = self.decoder.generate(
                self._ct_tokens(batch)[first],
                max_new_tokens=self.max_length,
                num_beams=self.beams,
                no_repeat_ngram_size=self.no_repeat,
                min_new_tokens=self.min_length,
                length_penalty=self.length_penalty,
                sampling=self.sampling,
                seeds=rows,
            )
        return {"row": rows, "text": texts, "embedding": self._embedding(batch)[first].double().cpu().numpy()}

    def _predict(
        self, trainer: L.Trainer, datamodule: CTDataModule, manifest: Manifest, write: bool
    ) -> dict[int, tuple[str, Any]]:
        """Return report and image embedding by row, gathered from all ranks."""
        self._writes = write
        loader = datamodule.loader(manifest)
        outputs: list[Any] = trainer.predict(self, dataloaders=loader) or [] if len(manifest) else []
        parts = [zip(out["row"], zip(out["text"], out["embedding"], strict=True), strict=True) for out in outputs]
        pairs = gather_objects([pair for part in parts for pair in part])
        by_row = dict(pairs)
        if not len(pairs) == len(by_row) == len(manifest):
            raise RuntimeError(f"report: {len(pairs)} outputs for {len(manifest)} rows; expected each row once.")
        return by_row

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With LoRA, remove the base model's weights from the checkpoint."""
        if self.lora is not None and self.decoder is not None:
            trainable = {name for name, parameter in self.decoder.named_parameters() if parameter.requires_grad}
            state = checkpoint["state_dict"]
            for name in [name for name in state if name.startswith("decoder.") and name[8:] not in trainable]:
                del state[name]

    def finish(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Save the decoder, and write and score the reports of the `test` studies, compared with baselines."""
        assert isinstance(datamodule, CTDataModule)
        assert self.decoder is not None
        decoder, upstream = self.decoder, {"dual-encoder": self.artefact.fingerprint}
        run_on_rank_zero(lambda: save_decoder(decoder, folder / ARTEFACT, upstream))
        metrics = last_values(self)
        test = datamodule.with_text(datamodule.manifest.split("test"))
        test = test.where(~test.frame["study_id"].duplicated().to_numpy())
        train = datamodule.training_rows()
        generated = self._predict(trainer, datamodule, test, write=True)
        keys = self._predict(trainer, datamodule, train, write=False) if len(test) else {}
        rows, train_rows = [int(row) for row in test.frame.index], [int(row) for row in train.frame.index]
        references, hypotheses = [test.report(row) for row in rows], [generated[row][0] for row in rows]
        table = pd.DataFrame({"study_id": test.frame["study_id"], "reference": references, "generated": hypotheses})
        if rank() == 0:
            write_text(folder / REPORTS, table.to_csv(index=False, lineterminator="\n"))
        baselines: dict[str, list[str]] = {}
        if rows:
            train_reports = [train.report(row) for row in train_rows]
            test_embeddings = np.stack([generated[row][1] for row in rows])
            train_embeddings = np.stack([keys[row][1] for row in train_rows])
            baselines["nearest"] = nearest_reports(test_embeddings, train_embeddings, train_reports)
            baselines["frequent"] = [most_frequent_report(train_reports)] * len(rows)
        names = datamodule.manifest.finding_names
        vocabulary = vocabulary_for(names) if names else load_vocabulary(self.vocabulary)
        patients = test.frame["patient_id"].tolist()
        scores = beside_baselines(references, hypotheses, baselines, patients, vocabulary)
        return metrics | {"studies": len(test)} | scores | extra_scores(references, hypotheses, self.extras)
