"""Stage 4: train a supervised multi-label head on the CT encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from ctx_distill.checkpoint import Artefact, write_artefact
from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.transforms.augment import Augmentation
from ctx_distill.distributed import global_ratio, own_first_rows, rank, run_on_rank_zero
from ctx_distill.errors import InputError
from ctx_distill.metrics.findings_report import findings_report
from ctx_distill.metrics.gathered import MacroAUROC
from ctx_distill.metrics.operating import THRESHOLD_RULE, choose_thresholds
from ctx_distill.models.ct_encoder import CTEncoder
from ctx_distill.models.dual_encoder import DualEncoder
from ctx_distill.models.heads import FindingsHead
from ctx_distill.run_files import ARTEFACT, PREDICTIONS
from ctx_distill.seeds import run_seed
from ctx_distill.stages.classifier.loss import LossSettings, findings_terms, mixup
from ctx_distill.training.base_task import TrainedTask, adamw, check_volume_spec, decay_groups, last_values
from ctx_distill.training.fault_tolerance import SurvivalSettings
from ctx_distill.training.layer_decay import layer_groups
from ctx_distill.training.pooled_features import features_key, write_features
from ctx_distill.training.predictions import predict_rows, study_means, write_predictions
from ctx_distill.training.row_features import CacheSettings, RowFeatures
from ctx_distill.types import CTBatch


class ClassifierTask(TrainedTask):
    """Train a linear probe, or fine-tune the encoder, on the labels 1 and 0; -1 and blank labels are ignored.

    Args:
        model: Folder of the stage-3 artefact; None starts from `encoder` instead.
        mode: `linear` freezes the encoder and computes its features once; `finetune` also trains the encoder.
        encoder: The CT encoder if there is no model: the supervised baseline, with `finetune`.
        augmentation: Augmentation of the volumes, with `finetune`.
        loss: Settings of the loss; mixup only with `finetune`.
        layer_decay: Learning rate of each encoder layer relative to the next layer towards the head (Clark et al. 2020;
            0.65 to 0.9 is usual); 1 uses one rate for all. Only with `finetune`.
        patience: Stop after this many epochs without a lower `val` loss; None disables early stopping.
        cache: Cache of the frozen encoder's pooled features, with `linear`: 4 D_c bytes per volume (3 KB at D_c = 768).
        optimizer: See `TrainedTask`.
        scheduler: See `TrainedTask`.
        warmup: See `TrainedTask`.
        select: See `TrainedTask`; here, `best` uses the labels of `val`.
        survival: See `TrainedTask`.
    """

    def __init__(
        self,
        model: str | None = None,
        mode: Literal["linear", "finetune"] = "linear",
        encoder: CTEncoder | None = None,
        augmentation: Augmentation = Augmentation(),
        loss: LossSettings = LossSettings(),
        layer_decay: float = 1.0,
        patience: int | None = None,
        cache: CacheSettings = CacheSettings(),
        optimizer: OptimizerCallable = adamw,
        scheduler: LRSchedulerCallable | None = None,
        warmup: float = 0.05,
        select: Literal["last", "best"] = "best",
        survival: SurvivalSettings = SurvivalSettings(),
    ) -> None:
        super().__init__(optimizer, scheduler, warmup, select, survival)
        self.artefact: Artefact | None = None
        if model is not None:
            dual, self.artefact = DualEncoder.load(Path(model))
            encoder = dual.ct_encoder
        elif encoder is None or mode != "finetune":
            raise InputError(
                f"classifier: model is not set, encoder is {'not set' if encoder is None else 'set'} and mode is {mode}. "
                "Run `ctx-distill align`, or train from scratch with `encoder` and mode finetune."
            )
        if mode != "finetune" and (loss.mixup or layer_decay != 1.0):
            raise InputError(
                f"classifier: mode is {mode}, but loss.mixup is {loss.mixup} and layer_decay {layer_decay}; both need a"
                " trainable encoder. Set mode=finetune (--model.init_args.mode=finetune)."
            )
        if not 0 < layer_decay <= 1 or (patience is not None and patience < 1):
            raise InputError(
                f"classifier: layer_decay is {layer_decay} and patience {patience}; expected a layer_decay above 0 and at"
                " most 1, and a patience of 1 or more epochs or null."
            )
        self.encoder = encoder
        self.loss, self.layer_decay, self.patience = loss, layer_decay, patience
        self.mode, self.augmentation = mode, augmentation
        self.encoder.requires_grad_(mode == "finetune")
        self.head: FindingsHead | None = None
        self.positive_weight: Tensor | None = None
        self._features = RowFeatures(cache)
        self.macro_auroc = MacroAUROC()

    def setup(self, stage: str) -> None:
        """Build the head for the manifest's labels, and compute the weights of positives from `train`."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if self.head is not None or not isinstance(datamodule, CTDataModule):
            return
        if self.artefact is not None:
            check_volume_spec(self.artefact, datamodule)
        names = datamodule.manifest.finding_names
        if not names:
            raise InputError(
                f"{datamodule.manifest.path}: no label:<finding> columns; the classifier needs at least one."
            )
        with torch.random.fork_rng(devices=[]):  # DDP reseeds before `setup`, a single process does not
            torch.manual_seed(run_seed())
            self.head = FindingsHead(self.encoder.embed_dim, len(names))
        labels = datamodule.manifest.split("train").labels()
        positives, negatives = (labels == 1).sum(axis=0), (labels == 0).sum(axis=0)
        ratio = torch.from_numpy((negatives + 1) / (positives + 1)).float()
        self.positive_weight = ratio.clamp(1.0, 10.0)
        if self.mode != "finetune":
            self._features.open_disk(self.trainer, list(datamodule.manifest.split("train", "val").frame.index))

    def on_train_epoch_end(self) -> None:
        """Log the epoch means, and once the size of the feature cache."""
        super().on_train_epoch_end()
        if self.mode != "finetune":
            self._features.report_once("classifier: pooled features of CT volumes")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups: the head at the full learning rate, encoder layers with `layer_decay`."""
        if self.layer_decay == 1.0:
            return super().parameter_groups()
        assert self.head is not None
        return decay_groups(self.head) + layer_groups(self.encoder, self.layer_decay)

    def configure_callbacks(self) -> list[Callback]:
        """Return the callbacks, including early stopping on the `val` loss if `patience` is set.

        Raises:
            InputError: `patience` is set but there is no `val` split.
        """
        callbacks = super().configure_callbacks()
        if self.patience is None:
            return callbacks
        manifest = getattr(getattr(self.trainer, "datamodule", None), "manifest", None)
        if manifest is not None and not len(manifest.split("val")):
            raise InputError(
                f"{manifest.path}: no `val` studies, but patience is {self.patience}. Set patience to null."
            )
        return [*callbacks, EarlyStopping("val/loss", patience=self.patience, mode="min")]

    def _pooled(self, batch: CTBatch) -> Tensor:
        if self.mode == "finetune":
            pooled: Tensor = self.encoder(batch.volume).pooled
            return pooled
        pooled = self._features.get(batch.row.tolist(), lambda new: self._frozen(batch.volume[new]))
        return pooled.to(batch.volume.device)

    @torch.no_grad()
    def _frozen(self, volume: Tensor) -> Tensor:
        self.encoder.eval()
        pooled: Tensor = self.encoder(volume).pooled
        return pooled

    def _logits(self, batch: CTBatch) -> Tensor:
        assert self.head is not None
        logits: Tensor = self.head(self._pooled(batch))
        return logits

    def _augmented(self, batch: CTBatch) -> CTBatch:
        assert batch.labels is not None
        if self.mode != "finetune":
            return batch
        seeds = self.row_seeds(batch.row)
        volume, labels = self.augmentation.apply(batch.volume, seeds), batch.labels
        if self.loss.mixup:
            volume, labels = mixup(volume, labels, self.loss.mixup, seeds)
        return replace(batch, volume=volume, labels=labels)

    def _loss(self, batch: CTBatch, logits: Tensor) -> Tensor:
        """Return the mean over the known labels of the global batch, with the gradient of a single process."""
        assert batch.labels is not None
        assert self.positive_weight is not None
        known = (batch.labels >= 0) & (batch.labels <= 1)
        target = torch.where(known, batch.labels, 0.0)
        loss = findings_terms(logits, target, self.loss, self.positive_weight.to(self.device))
        known = known & own_first_rows(batch.row)[:, None]
        return global_ratio((loss * known).sum(dim=1), known.sum(dim=1).to(loss.dtype))

    def training_step(self, batch: CTBatch, batch_idx: int) -> Tensor:
        """Return the loss of augmented volumes."""
        del batch_idx
        augmented = self._augmented(batch)
        loss = self._loss(augmented, self._logits(augmented))
        self.log_terms({"loss": loss}, "train", self.global_rows(batch.row))
        return loss

    def validation_step(self, batch: CTBatch, batch_idx: int) -> None:
        """Log the loss without augmentation, and the macro AUROC of the epoch's images."""
        del batch_idx
        assert batch.labels is not None
        logits = self._logits(batch)
        self.log_terms({"loss": self._loss(batch, logits)}, "val", self.global_rows(batch.row))
        first = own_first_rows(batch.row)
        self.macro_auroc.update(logits[first].sigmoid(), batch.labels[first])
        self.log("val/macro_auroc", self.macro_auroc, on_epoch=True)

    def predict_step(self, batch: CTBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return probabilities (B, F) and the pooled features (B, D_c)."""
        del batch_idx
        assert self.head is not None
        pooled = self._pooled(batch)
        return {"probability": self.head(pooled).sigmoid(), "pooled": pooled, "row": batch.row}

    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Train and score; without label columns, skip the stage with a message."""
        assert isinstance(datamodule, CTDataModule)
        if not datamodule.manifest.finding_names:
            reason = "the CT manifest has no label columns"
            print(f"classifier: skipped, {reason}")
            return {"macro_auroc": None, "left_out": reason}
        try:
            return super().run(trainer, datamodule, folder)
        finally:
            self._features.close()

    def _save(self, folder: Path, datamodule: CTDataModule) -> None:
        """Save the head and, with `finetune`, the encoder."""
        assert self.head is not None
        tensors = self.head.state_dict(prefix="head.")
        if self.mode == "finetune":
            tensors |= self.encoder.state_dict(prefix="encoder.")
        config = {
            "findings": list(datamodule.manifest.finding_names),
            "mode": self.mode,
            "volume_spec": datamodule.volume.to_config(),
            "encoder": self.encoder.config(),
        }
        upstream = {} if self.artefact is None else {"dual-encoder": self.artefact.fingerprint}
        write_artefact(folder, "classifier", config, tensors, upstream)

    def finish(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Save the head and its predictions, and score `test` at thresholds chosen on `val`."""
        assert isinstance(datamodule, CTDataModule)
        assert self.head is not None
        names = list(datamodule.manifest.finding_names)
        metrics = last_values(self)
        run_on_rank_zero(lambda: self._save(folder / ARTEFACT, datamodule))
        self._save_features(trainer, datamodule, folder)
        test = datamodule.manifest.split("test")
        if not len(test):
            return {**metrics, "macro_auroc": None, "per_finding": {}}
        predictions = predict_rows(trainer, self, datamodule.loader(test), list(test.frame.index))
        studies, means = study_means(test, predictions["probability"].numpy())
        if rank() == 0:
            columns = {name: means[:, column] for column, name in enumerate(names)}
            write_predictions(folder / PREDICTIONS, studies, columns)
        labelled = [f"label:{name}" for name in names]
        val = datamodule.manifest.split("val")
        val_scores = np.zeros((0, len(names)))
        if len(val):
            val_predictions = predict_rows(trainer, self, datamodule.loader(val), list(val.frame.index))
            val_scores = val_predictions["probability"].numpy()
        val_studies, val_means = study_means(val, val_scores)
        thresholds = choose_thresholds(val_studies[labelled].to_numpy(), val_means)
        labels, patients = studies[labelled].to_numpy(), studies["patient_id"].tolist()
        scored = findings_report(labels, means, names, patients, thresholds)
        return metrics | scored | {"threshold_rule": THRESHOLD_RULE}

    def _save_features(self, trainer: L.Trainer, datamodule: CTDataModule, folder: Path) -> None:
        """Save the frozen encoder's features of all volumes, so that few-shot probes need not encode them again."""
        if self.mode != "linear" or self.artefact is None:
            return
        manifest = datamodule.manifest
        predictions = predict_rows(trainer, self, datamodule.loader(manifest), list(manifest.frame.index))
        if rank() == 0:
            key = features_key(self.artefact.fingerprint, manifest.fingerprint)
            write_features(folder, key, predictions["pooled"].float().numpy())
