"""Stage 3: robust contrastive alignment of CT and report, from the stage-2 weights (method, stage 3)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from ctx_distill.checkpoint import hash_json, require_same
from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.transforms.augment import Augmentation
from ctx_distill.distributed import gather_with_gradient, own_first_rows, rank, run_on_rank_zero, world_size
from ctx_distill.errors import InputError
from ctx_distill.losses.contrastive import contrastive_loss
from ctx_distill.losses.distillation import pair_loss
from ctx_distill.losses.siglip import INIT_LOGIT_BIAS, INIT_LOGIT_SCALE, siglip_loss
from ctx_distill.losses.soft_targets import soft_target_loss
from ctx_distill.metrics.gathered import ReportRecall
from ctx_distill.metrics.retrieval import recall_at_k
from ctx_distill.models.compute import ComputeSettings
from ctx_distill.models.ct_encoder import CTEncoder
from ctx_distill.models.dual_encoder import DualEncoder, load_ct_encoder
from ctx_distill.models.heads import ProjectionHead
from ctx_distill.models.weights import resolve_source
from ctx_distill.retrieval.lookup import NeighbourLookup
from ctx_distill.run_files import ARTEFACT, CORRECTED
from ctx_distill.stages.align.distillation_regulariser import DistillationRegulariser, DistillationRegulariserSettings
from ctx_distill.stages.align.entity_masking import EntityMasking, MaskingSettings
from ctx_distill.stages.align.evidence import FalseNegatives, RobustSettings
from ctx_distill.stages.align.masked_language_loss import masked_language_loss
from ctx_distill.stages.align.moving_average import MovingAverage
from ctx_distill.stages.align.objective import Objective, SoftTargetSettings, check_objective, soft_target_temperature
from ctx_distill.stages.align.report_tower import TextSettings, build_report_tower
from ctx_distill.stages.align.training_reports import TrainingReports
from ctx_distill.stages.shared.frozen_expert import open_queries, open_teacher
from ctx_distill.stages.shared.projection_prior import PriorSettings, ProjectionPrior
from ctx_distill.stages.shared.report_views import report_views
from ctx_distill.training.base_task import LARGEST_LOGIT_SCALE, TrainedTask, adamw, decay_groups, last_values
from ctx_distill.training.cached_batches import HostStorage, check_micro_batch, encode_in_micro_batches, on_host
from ctx_distill.training.fault_tolerance import SurvivalSettings
from ctx_distill.training.predictions import predict_rows
from ctx_distill.training.row_features import MEMORY_GB, WORTH_A_LINE
from ctx_distill.training.row_tables import RowTables
from ctx_distill.types import CTBatch


class AlignmentTask(TrainedTask):
    """Align CT and report with a contrastive loss over the global batch: robust InfoNCE, or a baseline objective.

    Args:
        expert: Folder or hub name of the X-ray expert, whose frozen text tower provides the evidence.
        index: Folder of the stage-1 artefact.
        text: The report tower.
        student: Folder of the stage-2 artefact; None starts from `encoder` instead.
        encoder: The CT encoder if there is no student.
        expert_revision: Pinned commit of a hub expert.
        objective: `infonce`, with the corrections of `robust`; or, without corrections, `siglip` (the pairwise sigmoid
            loss) or `soft-targets` (InfoNCE against a softmax of report similarities).
        soft_targets: Settings of `soft-targets`.
        robust: How false negatives are identified and corrected.
        keep: The distillation regulariser.
        prior: The projection prior, added to the image features after training.
        neighbours: X-rays mixed into the evidence `retrieved`.
        subset_share: Probability that a step reduces a report to a random subset of its sentences, at least one.
        augmentation: Augmentation of the volumes.
        chunk: Rows of logits computed at once; None computes all.
        micro_batch: Volumes encoded at once per rank, with the gradients of the complete batch
            (`ctx_distill.training.gradient_cache`). Only the features' memory then grows with the batch. None encodes the
            complete batch at once.
        storage: Type of the volumes that wait on the host if `micro_batch` is set.
        masking: Entity-focused masking, in addition to the contrastive loss; needs a trainable bidirectional text tower.
        cache_gb: Memory per rank, in gigabytes, of the training reports' tables (embeddings, retrieved features), 2 KB
            per row and table at 512 dimensions; tables that do not fit are memory-mapped files in the stage's folder.
            Also the size of the cache of projection features (`keep.projection`); features that do not fit are recomputed.
        optimizer: See `TrainedTask`.
        scheduler: See `TrainedTask`.
        warmup: See `TrainedTask`.
        select: See `TrainedTask`.
        survival: See `TrainedTask`.
        compute: Memory and speed of the CT encoder in training.
    """

    def __init__(
        self,
        expert: str,
        index: str,
        text: TextSettings = TextSettings(),
        student: str | None = None,
        encoder: CTEncoder | None = None,
        expert_revision: str | None = None,
        objective: Objective = "infonce",
        soft_targets: SoftTargetSettings = SoftTargetSettings(),
        robust: RobustSettings = RobustSettings(),
        keep: DistillationRegulariserSettings = DistillationRegulariserSettings(),
        prior: PriorSettings = PriorSettings(),
        neighbours: int = 8,
        subset_share: float = 0.75,
        augmentation: Augmentation = Augmentation(),
        chunk: int | None = None,
        micro_batch: int | None = None,
        storage: HostStorage = "float32",
        masking: MaskingSettings = MaskingSettings(),
        cache_gb: float = MEMORY_GB,
        optimizer: OptimizerCallable = adamw,
        scheduler: LRSchedulerCallable | None = None,
        warmup: float = 0.05,
        select: Literal["last", "best"] = "last",
        survival: SurvivalSettings = SurvivalSettings(),
        compute: ComputeSettings = ComputeSettings(),
    ) -> None:
        super().__init__(optimizer, scheduler, warmup, select, survival)
        self.compute = compute
        check_micro_batch(micro_batch)
        check_objective(objective, robust)
        self.micro_batch, self.storage = micro_batch, storage
        self.masking = masking
        self.entity_masking: EntityMasking | None = None
        self._searched = "retrieved" in robust.evidence or keep.weight > 0
        teacher, store = open_teacher(expert, expert_revision, index, searched=self._searched)
        self._teacher, self._queries = (teacher,), (open_queries(teacher, store),)
        self.lookup = NeighbourLookup(store, min(neighbours, len(store)), "mean")
        self.student_spec: str | None = None
        self.upstream = {"xray-expert": teacher.fingerprint(), "xray-index": store.fingerprint}
        projection = None
        if student is not None:
            encoder, projection = self._take_student(student)
        elif encoder is None:
            raise InputError(
                "stage 3: neither student nor encoder is set. Run `ctx-distill distill`, or set `encoder`."
            )
        self.ct_encoder, self.image_projection = encoder, projection
        self.text = text
        # A student is already in the expert's space; a randomly initialised encoder would overfit at the expert's scale.
        self.scale = (teacher.logit_scale if student is not None else None) or 1 / 0.07
        self.objective, self.soft_targets = objective, soft_targets
        self.logit_bias: torch.nn.Parameter | None = None
        if objective == "siglip":
            self.scale, self.logit_bias = INIT_LOGIT_SCALE, torch.nn.Parameter(torch.tensor(INIT_LOGIT_BIAS))
        elif objective == "soft-targets":
            self.soft_temperature = soft_target_temperature(soft_targets, teacher)
        self.text_source = (expert, expert_revision)
        self.model: DualEncoder | None = None
        self.robust, self.keep, self.subset_share = robust, keep, subset_share
        self.cache_gb = cache_gb
        self.augmentation, self.chunk = augmentation, chunk
        self.moving_average: MovingAverage | None = None
        self.training_reports: TrainingReports | None = None
        self.false_negatives: FalseNegatives | None = None
        self.regulariser: DistillationRegulariser | None = None
        self.prior_settings = prior
        self.prior: ProjectionPrior | None = None
        self.report_recall = ReportRecall(5)

    def _take_student(self, student: str) -> tuple[CTEncoder, ProjectionHead]:
        """Return encoder and projection of a stage-2 artefact, after checking the expert and index it was built from."""
        encoder, projection, artefact = load_ct_encoder(Path(student))
        for what, name in (("expert", "xray-expert"), ("index", "xray-index")):
            require_same(
                f"the {what} of stage 3", self.upstream[name],
                f"the {what} that the student {student} was distilled from", artefact.upstream[name],
                f"Rerun `ctx-distill distill`, or use the {what} that it was distilled from.",
            )  # fmt: skip
        self.student_spec = hash_json(artefact.config["volume_spec"])
        self.upstream["ct-encoder"] = artefact.fingerprint
        return encoder, projection

    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Build the dual encoder, then train it."""
        assert isinstance(datamodule, CTDataModule)
        text_encoder = build_report_tower(self.text, self.text_source, datamodule.training_rows())
        space = self.text.projection_dim or text_encoder.embed_dim
        projection = self.image_projection
        if projection is not None and projection.config["out_dim"] != space:
            projection = None
        weight = self.prior_settings.weight
        if weight:
            self.prior = ProjectionPrior(self._teacher[0], space)
        self.model = DualEncoder(
            self.ct_encoder, text_encoder, self.text.projection_dim, projection, self.scale, weight
        )  # fmt: skip
        if self.robust.needs_moving_average():
            threshold = self.robust.thresholds.get("ema")
            self.moving_average = MovingAverage(self.model, self.robust.ema_decay, threshold)
        if self.masking.weight:
            self.entity_masking = EntityMasking.beside(self.model, self.masking, datamodule.volume.shape)
        return super().run(trainer, datamodule, folder)

    def unfit_for_shards(self) -> dict[str, bool]:
        """See `TrainedTask`. Cached gradients and the moving average access weights directly, which bypasses FSDP2."""
        return {
            "compute.compile": self.compute.compile,
            "micro_batch": self.micro_batch is not None,
            "robust.evidence ema": self.robust.needs_moving_average(),
            "masking.weight": bool(self.masking.weight),
        }

    @property
    def dual(self) -> DualEncoder:
        """The dual encoder; available once `run` has built it."""
        assert self.model is not None
        return self.model

    def setup(self, stage: str) -> None:
        """Check the volume spec, and compute the frozen features of the training studies once for the stage."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if stage != "fit" or not isinstance(datamodule, CTDataModule):
            return
        if self.student_spec is not None:
            require_same(
                "the volume spec of stage 3", hash_json(datamodule.volume.to_config()),
                "the volume spec that the student was distilled with", self.student_spec,
                "Set the same data.init_args.volume for both stages.",
            )  # fmt: skip
        device = self.trainer.strategy.root_device
        teacher, queries = self._teacher[0].to(device), self._queries[0].to(device)
        if self._searched:
            self.lookup.store.place(device)
        tables = RowTables(self.cache_gb, Path(self.trainer.default_root_dir))
        self.training_reports = TrainingReports(datamodule.training_rows(), teacher, queries, tables)
        if self.robust.evidence:
            self.false_negatives = FalseNegatives(self.robust, self.training_reports, self.lookup, self.moving_average)
        if self.keep.weight > 0:
            self.regulariser = DistillationRegulariser(
                self.keep, self.training_reports, self.lookup.store, self.dual.embed_dim, self.cache_gb
            )
        if rank() == 0 and tables.held_bytes + tables.mapped_bytes >= WORTH_A_LINE:
            print(f"stage 3: tables of the training reports: {tables.describe()}")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups, with separate groups for the text tower because of its `lr_factor`."""
        text = list(self.dual.text_encoder.parameters())
        text_groups = [{**group, "lr_factor": self.text.lr_factor} for group in decay_groups(self.dual.text_encoder)]
        return [*decay_groups(self, without=text), *text_groups]

    def rank_state(self) -> dict[str, Any]:
        """Return the base class's state, with the counts and the record of suspected pairs."""
        false_negatives = self.false_negatives
        if false_negatives is None:
            return super().rank_state() | {"counts": {}}
        return super().rank_state() | {"counts": dict(false_negatives.counts), "pairs": false_negatives.pairs.state()}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore `rank_state`."""
        super().load_rank_state(state)
        if self.false_negatives is not None:
            self.false_negatives.counts.update(state["counts"])
            if "pairs" in state:  # older checkpoints have no record of pairs
                self.false_negatives.pairs.load_state(state["pairs"])

    def transfer_batch_to_device(self, batch: CTBatch, device: torch.device, dataloader_idx: int) -> CTBatch:
        """Move a batch to the device; with `micro_batch`, volumes stay on the host until they are encoded."""

        def move(batch: CTBatch) -> CTBatch:
            moved: CTBatch = super(AlignmentTask, self).transfer_batch_to_device(batch, device, dataloader_idx)
            return moved

        return on_host(batch, self.storage, move) if self.micro_batch and self.trainer.training else move(batch)

    def _encode(self, batch: CTBatch) -> tuple[Tensor, ...]:
        """Return features of this rank's augmented volumes and report views, both (b, D).

        The projection prior is not used in training: with it, the encoder learns almost nothing (docs/ablation.md).

        With `masking`, also return the sums and counts of `masked_language_sums`. With `micro_batch`, this method runs
        twice per micro-batch (see `encode_cached`), so every result has one row per volume, and nothing is gathered
        before `_contrast`.
        """
        image, output = self.dual.encode_alone(self.augmentation.apply(batch.volume, self.row_seeds(batch.row)))
        text = self.dual.encode_text(report_views(batch.report, self.row_seeds(batch.row, "view"), self.subset_share))
        if self.entity_masking is None:
            return image, text
        seeds = self.row_seeds(batch.row, "masking")
        return image, text, *self.entity_masking(self.dual.text_encoder, batch.report, seeds, output.tokens)

    def _contrast(self, image: Tensor, text: Tensor, batch: CTBatch) -> dict[str, Tensor]:
        """Return the contrastive terms of the global batch, including `loss`, from this rank's features."""
        study = gather_with_gradient(batch.study)
        image, text = gather_with_gradient(image), gather_with_gradient(text)
        terms = self._objective_terms(image, text, study, batch)
        terms["loss"] = terms.pop("total")
        if self.regulariser is not None:
            terms["keep"] = pair_loss(image, gather_with_gradient(self.regulariser.targets(batch)))
            terms["loss"] = terms["loss"] + self.keep.weight * terms["keep"]
        terms["logit_scale"] = self.dual.logit_scale.detach().exp()
        return terms

    def _objective_terms(self, image: Tensor, text: Tensor, study: Tensor, batch: CTBatch) -> dict[str, Tensor]:
        scale = self.dual.logit_scale.exp()
        if self.false_negatives is not None:
            return self.false_negatives.loss(image, text, scale, study, batch, self.current_epoch, self.chunk)
        if self.objective == "soft-targets":
            assert self.training_reports is not None
            reports = self.training_reports.embeddings[self.training_reports.places(batch.row)].to(image.device)
            return soft_target_loss(
                image, text, scale, gather_with_gradient(reports), study,
                self.soft_targets.weight, self.soft_temperature, self.chunk,
            )  # fmt: skip
        return self._plain_terms(image, text, study)

    def _plain_terms(self, image: Tensor, text: Tensor, study: Tensor) -> dict[str, Tensor]:
        """Return the objective without corrections and soft targets, which exist for training rows only."""
        scale = self.dual.logit_scale.exp()
        if self.logit_bias is None:
            return contrastive_loss(image, text, scale, study=study, chunk=self.chunk)
        terms = siglip_loss(image, text, scale, self.logit_bias, study, self.chunk)
        return {**terms, "logit_bias": self.logit_bias.detach()}

    def training_step(self, batch: CTBatch, batch_idx: int) -> Tensor:
        """Return the loss over the global batch."""
        del batch_idx
        if self.micro_batch is None:
            image, text, *masked = self._encode(batch)
        else:
            dtype = self.dual.logit_scale.dtype
            image, text, *masked = encode_in_micro_batches(
                self._encode, batch, self.micro_batch, self.parameters(), self.device, dtype
            )
        terms = self._contrast(image, text, batch)
        if masked:
            efm = masked_language_loss(*masked)
            terms["loss"] = terms["loss"] + self.masking.weight * efm["total"]
            # The accuracy of a kind without chosen tokens is NaN, on all ranks alike.
            terms |= {f"efm_{name}": value for name, value in efm.items() if not value.isnan()}
        self.log_terms({name: value.float() for name, value in terms.items()}, "train", len(batch.row) * world_size())
        return terms["loss"]

    def on_train_epoch_start(self) -> None:
        """Fix the moving average's threshold after the warm-up, before the first correction."""
        false_negatives = self.false_negatives
        if false_negatives is not None and false_negatives.needs_threshold(self.current_epoch):
            datamodule = getattr(self.trainer, "datamodule", None)
            assert isinstance(datamodule, CTDataModule)
            with self.trainer.precision_plugin.forward_context():
                threshold = false_negatives.measure_threshold(datamodule)
            false_negatives.fix_threshold(self.trainer.strategy.broadcast(threshold))

    def on_train_epoch_end(self) -> None:
        """Log the epoch means, and the counts, precision and recall of the suspected pairs."""
        super().on_train_epoch_end()
        if self.regulariser is not None:
            self.regulariser.projection.features.report_once("stage 3: features of projections")
        if self.false_negatives is not None:
            # Counts are over the global batch, so they are the same on every rank.
            for name, value in self.false_negatives.drain_counts().items():
                self.log(f"train/{name}", value)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Run an optimizer step, then update the moving average."""
        super().optimizer_step(*args, **kwargs)
        if self.moving_average is not None and not (self.guard is not None and self.guard.last_step_was_skipped()):
            self.moving_average.update_parameters(self.dual)

    def validation_step(self, batch: CTBatch, batch_idx: int) -> None:
        """Log InfoNCE or the sigmoid loss on complete reports, without augmentation and corrections, and the recall."""
        del batch_idx
        image, _ = self.dual.encode_alone(batch.volume)
        text = self.dual.encode_text(batch.report)
        first = own_first_rows(batch.row)
        self.report_recall.update(image[first], text[first], batch.study[first])
        self.log("val/recall_at_5", self.report_recall, on_epoch=True)
        image, text, study = self.gather_once(batch.row, image, text, batch.study)
        terms = self._plain_terms(image, text, study)
        self.log_terms({"loss": terms["total"]}, "val", len(study))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Clamp the logit scale to CLIP's bounds, [1, 100]."""
        del outputs, batch, batch_idx
        with torch.no_grad():
            self.dual.logit_scale.clamp_(0.0, LARGEST_LOGIT_SCALE)

    def predict_step(self, batch: CTBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return image and report features of a batch, both (B, D), unit rows."""
        del batch_idx
        prior = None if self.prior is None else self.prior.features(batch)
        image, _ = self.dual.encode_volume(batch.volume, prior)
        return {"image": image, "text": self.dual.encode_text(batch.report), "row": batch.row}

    def _save(self, folder: Path, datamodule: CTDataModule) -> None:
        """Save the dual encoder, and with the projection prior a copy of the expert."""
        expert = resolve_source(*self.text_source) if self.prior is not None else None
        self.dual.save(folder, self.upstream, datamodule.volume.to_config(), expert)

    def _write_pairs(self, path: Path, datamodule: CTDataModule) -> None:
        """Write the corrected pairs with their study ids."""
        assert self.false_negatives is not None
        train = datamodule.training_rows()
        studies = dict(zip(train.study_codes().tolist(), train.frame["study_id"].astype(str), strict=True))
        self.false_negatives.pairs.write(path, studies, self.false_negatives.all_thresholds())

    def finish(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Save the dual encoder and the corrected pairs, and compute report-to-volume recall on CT `val`."""
        assert isinstance(datamodule, CTDataModule)
        run_on_rank_zero(lambda: self._save(folder / ARTEFACT, datamodule))
        metrics = last_values(self)
        if self.false_negatives is not None:
            fixed = self.false_negatives.all_thresholds()
            metrics["thresholds"] = {kind: x if math.isfinite(x) else None for kind, x in fixed.items()}
            metrics["pairs"] = dict(self.false_negatives.pairs.totals)
            run_on_rank_zero(lambda: self._write_pairs(folder / CORRECTED, datamodule))
        val = datamodule.with_text(datamodule.manifest.split("val"))
        if len(val) > 1:
            features = predict_rows(trainer, self, datamodule.loader(val), list(val.frame.index))
            codes = val.study_codes()
            metrics |= recall_at_k(features["text"].numpy(), features["image"].numpy(), codes, codes, ks=(1, 5, 10))
            metrics["recall_at_5_random"] = min(1.0, 5 / len(val))
        return metrics
