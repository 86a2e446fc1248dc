"""Stage 2: distil the frozen X-ray expert into the CT encoder (method, stage 2)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.transforms.augment import Augmentation
from ctx_distill.data.transforms.projection import PROJECTION_VERSION
from ctx_distill.distributed import rank, run_on_rank_zero
from ctx_distill.errors import InputError
from ctx_distill.losses.distillation import NEAR_UNIFORM, distillation_loss, mix_neighbours, scheduled
from ctx_distill.metrics.classification import classification_report
from ctx_distill.models.compute import ComputeSettings
from ctx_distill.models.ct_encoder import CTEncoder
from ctx_distill.models.dual_encoder import save_ct_encoder
from ctx_distill.models.heads import ProjectionHead
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.run_files import ARTEFACT
from ctx_distill.stages.distill.anchors import AnchorKind, Anchors
from ctx_distill.stages.distill.lookup_cost import LookupClock
from ctx_distill.stages.distill.targets import (
    NeighbourSettings,
    OracleTeacher,
    ProjectionTeacher,
    RetrievedTeacher,
    TeacherSettings,
)
from ctx_distill.stages.shared.frozen_expert import open_queries, open_teacher
from ctx_distill.stages.shared.prompt_scores import pair_probabilities, prompt_features
from ctx_distill.stages.shared.report_views import report_views
from ctx_distill.training.base_task import TIMINGS, TrainedTask, adamw, last_values
from ctx_distill.training.fault_tolerance import SurvivalSettings
from ctx_distill.training.predictions import predict_rows, study_means
from ctx_distill.training.row_features import MEMORY_GB, ReportFeatures
from ctx_distill.types import CTBatch


@dataclass(frozen=True)
class DistillationWeights:
    """Weights of the pair-wise and the relation loss."""

    pair: float = 1.0
    relation: float = 1.0


@dataclass(frozen=True)
class DistillationSchedule:
    """Final values of scheduled settings (**ours**); None keeps the initial value.

    Attributes:
        tau_end: Final temperature, interpolated geometrically per step.
        pair_end: Final pair-wise weight, interpolated linearly per step.
        relation_end: Final relation weight, interpolated linearly per step.
    """

    tau_end: float | None = None
    pair_end: float | None = None
    relation_end: float | None = None


class DistillationTask(TrainedTask):
    """Distil the expert's embeddings and relations, with live lookups on every rank.

    The expert is not a submodule, so it is neither trained nor saved.

    Args:
        encoder: The CT encoder to train.
        expert: Folder or hub name of the X-ray expert.
        index: Folder of the stage-1 artefact.
        expert_revision: Pinned commit of a hub expert.
        teachers: Weights of the retrieved X-rays and of the CT's own projection in the target.
        neighbours: How X-rays are retrieved and mixed.
        weights: Of the pair-wise and the relation loss.
        tau: Temperature of the relation loss; None uses the expert's.
        schedule: How temperature and weights change during training. Validation always uses the final values, so that
            its losses are comparable.
        anchors: `batch`: the report embeddings of the global batch; `prompts`: findings prompts; both need the expert's
            joint space. `bank`: image features of the pool, for an expert without a joint space.
        bank_size: X-rays of the bank.
        vocabulary: Findings of the anchor prompts, and findings that the re-rank extracts from the reports.
        augmentation: Augmentation of the volumes.
        cache_gb: Memory per cache and rank, in gigabytes. The caches hold frozen features by row (reports as queries,
            reports as anchors, projections), 2 KB per row at 512 dimensions. Features that do not fit are recomputed.
        optimizer: See `TrainedTask`.
        scheduler: See `TrainedTask`.
        warmup: See `TrainedTask`.
        select: See `TrainedTask`.
        survival: See `TrainedTask`.
        compute: Memory and speed of the encoder in training.

    Raises:
        InputError: Expert, index and settings are incompatible.
    """

    def __init__(
        self,
        encoder: CTEncoder,
        expert: str,
        index: str,
        expert_revision: str | None = None,
        teachers: TeacherSettings = TeacherSettings(),
        neighbours: NeighbourSettings = NeighbourSettings(),
        weights: DistillationWeights = DistillationWeights(),
        tau: float | None = None,
        schedule: DistillationSchedule = DistillationSchedule(),
        anchors: AnchorKind = "batch",
        bank_size: int = 1024,
        vocabulary: str = "ct-rate",
        augmentation: Augmentation = Augmentation(),
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
        self._searched = teachers.retrieved > 0 and neighbours.control != "oracle"
        teacher, store = open_teacher(
            expert, expert_revision, index, neighbours.placement, neighbours.device, self._searched
        )
        if store.config.get("value_dim") != store.value_dim or store.value_dim != teacher.embed_dim:
            raise InputError(
                f"{index}: the index declares values of {store.config.get('value_dim')} dimensions and contains "
                f"{store.value_dim}; the expert {expert} has {teacher.embed_dim}. Rebuild the index (`ctx-distill index`)."
            )
        self._teacher = (teacher,)
        self.store = store
        self.teachers, self.neighbours = teachers, neighbours
        self.oracle: OracleTeacher | None = None
        self.projection_teacher = ProjectionTeacher(cache_gb)
        self.encoder = encoder
        self.projection = ProjectionHead(encoder.embed_dim, store.value_dim)
        self.weights, self.schedule = weights, schedule
        self.tau = tau if tau is not None or teacher.logit_scale is None else 1.0 / teacher.logit_scale
        self.anchors: Anchors | None = None
        if max(weights.relation, schedule.relation_end or 0.0) > 0:
            self.anchors = Anchors(anchors, teacher, store, bank_size, vocabulary)
            if self.tau is None:
                raise InputError(f"{expert}: the expert has no temperature; set --model.init_args.tau=0.05.")
        for name, value in (("tau", self.tau), ("schedule.tau_end", schedule.tau_end)):
            if value is not None and value <= 0:
                raise InputError(f"stage 2: {name} is {value}; expected a temperature above 0, such as 0.05.")
        self.augmentation = augmentation
        query_encoder = open_queries(teacher, store)
        self._queries = ReportFeatures(query_encoder, cache_gb)
        self._anchor_texts = self._queries if query_encoder is teacher else ReportFeatures(teacher, cache_gb)
        self.retrieved = RetrievedTeacher(store, neighbours, vocabulary, self._queries)
        self.lookup_clock = LookupClock()
        self._steps, self._warned = 1, False

    def unfit_for_shards(self) -> dict[str, bool]:
        """See `TrainedTask`."""
        return {"compute.compile": self.compute.compile}

    @property
    def teacher(self) -> XrayExpert:
        """The frozen expert, on this module's device."""
        return self._teacher[0].to(self.device)

    def features(self, volume: Tensor) -> Tensor:
        """Return h~ before normalisation, (B, D_e), of volumes (B, 1, D, H, W)."""
        projected: Tensor = self.projection(self.encoder(volume).pooled)
        return projected

    def setup(self, stage: str) -> None:
        """Check that the data provide what the teachers need, and prepare the index.

        Raises:
            InputError: Projections, report texts or labels are missing.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        if stage != "fit" or not isinstance(datamodule, CTDataModule):
            return
        if self.teachers.projection > 0 and not datamodule.projection:
            raise InputError(
                f"stage 2: teachers.projection is {self.teachers.projection}, but the data module computes no projections."
                " Set data.init_args.projection=true."
            )
        used = datamodule.with_text(datamodule.manifest.split("train", "val"))
        silent = len(used) - len(datamodule.report_rows(used))
        if self.teachers.projection == 0 and silent:
            raise InputError(
                f"{datamodule.manifest.path}: {silent} CTs of `train` and `val` have no report text, and the retrieved "
                "X-rays are the only teacher. Set data.init_args.text=required to exclude them, or set "
                "teachers.projection above 0."
            )
        if self._searched:
            self.store.place(self.trainer.strategy.root_device)
        if self.neighbours.control == "oracle":
            self.oracle = OracleTeacher(self.store, self.neighbours, datamodule.manifest.finding_names)
        elif self.neighbours.lookup == "static" and self.teachers.retrieved > 0:
            reported = datamodule.report_rows(used)
            rows = [int(row) for row in reported.frame.index]
            with self.trainer.precision_plugin.train_step_context():
                self.retrieved.prepare(rows, [reported.report(row) for row in rows], self.trainer.strategy.root_device)

    def on_train_start(self) -> None:
        """Store the number of steps of the schedule."""
        self._steps = max(1, int(self.trainer.estimated_stepping_batches))

    def on_train_epoch_start(self) -> None:
        """Restart the lookup clock for the first step."""
        self.lookup_clock.restart()

    def on_train_epoch_end(self) -> None:
        """Log the epoch means, and once the size of the feature caches."""
        super().on_train_epoch_end()
        self._queries.whole.report_once("stage 2: features of complete reports")
        self._anchor_texts.whole.report_once("stage 2: features of complete reports as anchors")
        self.projection_teacher.features.report_once("stage 2: features of projections")

    def on_validation_end(self) -> None:
        """Restart the lookup clock, so that the validation does not count towards the next step."""
        self.lookup_clock.restart()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the cost of the step's lookups."""
        del outputs, batch, batch_idx
        for name, value in zip(TIMINGS, self.lookup_clock.end_step(), strict=True):
            self.log(name, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def _progress(self) -> float:
        return min(1.0, self.global_step / max(1, self._steps - 1))

    def _now(self, progress: float) -> dict[str, float]:
        """Return temperature and weights at a progress in [0, 1] of the training."""
        end = self.schedule
        return {
            "tau": scheduled(self.tau or 1.0, end.tau_end, progress, "geometric"),
            "pair": scheduled(self.weights.pair, end.pair_end, progress, "linear"),
            "relation": scheduled(self.weights.relation, end.relation_end, progress, "linear"),
        }

    def _target(self, batch: CTBatch, views: list[str]) -> Tensor:
        """Return u_i of this rank's rows, (b, D_v) unit rows."""
        device, has_text = batch.row.device, [bool(view) for view in views]
        if self.teachers.retrieved == 0:
            return self.projection_teacher.targets(batch, self.teacher)
        if self.oracle is not None:
            retrieved = self.oracle.targets(batch)
        else:
            with self.lookup_clock.measure(device):
                retrieved = self.retrieved.targets(
                    batch.row, batch.report, views, self.row_seeds(batch.row, "neighbour")
                )
        if self.teachers.projection == 0:
            return retrieved
        both = torch.stack([retrieved, self.projection_teacher.targets(batch, self.teacher)], dim=1)
        weights = torch.tensor([[self.teachers.retrieved * has, self.teachers.projection] for has in has_text])
        return mix_neighbours(both, weights.to(device))

    def _anchors_of(self, batch: CTBatch, views: list[str]) -> Tensor | None:
        """Return the anchors, (K, D_v) unit rows, the same on every rank; None without a relation term."""
        if self.anchors is None:
            return None
        texts = None
        if self.anchors.kind == "batch":
            (texts,) = self.gather_once(batch.row, self._anchor_texts.embed(batch.row, batch.report, views))
            texts = texts[texts.any(dim=1)]
        return self.anchors.anchors_for(self.teacher, texts, batch.row.device)

    def _terms(self, batch: CTBatch, train: bool) -> tuple[dict[str, Tensor], int]:
        """Return the loss terms of the global batch, and its number of rows."""
        volume = self.augmentation.apply(batch.volume, self.row_seeds(batch.row)) if train else batch.volume
        views = batch.report
        if train:
            views = report_views(batch.report, self.row_seeds(batch.row, "view"), self.neighbours.subset_share)
        with torch.no_grad():
            target, anchors = self._target(batch, views), self._anchors_of(batch, views)
        student, target = self.gather_once(batch.row, self.features(volume), target)
        now = self._now(self._progress() if train else 1.0)
        weights = {"pair": now["pair"], "relation": now["relation"]}
        terms = distillation_loss(student, target, anchors, now["tau"], weights)
        terms["loss"] = terms.pop("total")
        if self.schedule != DistillationSchedule():
            terms |= {f"now_{name}": torch.tensor(value) for name, value in now.items()}
        return terms, len(student)

    def training_step(self, batch: CTBatch, batch_idx: int) -> Tensor:
        """Return L_distill of a batch."""
        terms, rows = self._terms(batch, train=True)
        if batch_idx == 0 and not self._warned:
            self._warn_of_uniform_targets(terms)
        self.log_terms(terms, "train", rows)
        return terms["loss"]

    def _warn_of_uniform_targets(self, terms: dict[str, Tensor]) -> None:
        """Warn once per run, on rank zero, if p* is nearly uniform."""
        if rank() != 0 or not terms.get("target_near_uniform", torch.zeros(())):
            return
        self._warned = True
        warnings.warn(
            f"stage 2: the relation's target p* is nearly uniform: entropy {float(terms['target_entropy']):.3f} nats, "
            f"{100 * float(terms['target_entropy_share']):.1f} % of log |A| (warned above {100 * NEAR_UNIFORM:.0f} %), "
            f"at tau {self._now(self._progress())['tau']:g}, so the relation term has almost no effect. Set a smaller "
            "model.init_args.tau.",
            stacklevel=2,
        )

    def validation_step(self, batch: CTBatch, batch_idx: int) -> None:
        """Log the loss without augmentation, on complete reports, with the schedule's final values."""
        del batch_idx
        terms, rows = self._terms(batch, train=False)
        self.log_terms(terms, "val", rows)

    def predict_step(self, batch: CTBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return normalised features (B, D_e)."""
        del batch_idx
        return {"features": F.normalize(self.features(batch.volume), dim=-1), "row": batch.row}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the expert's fingerprint; its weights are not in the checkpoint."""
        checkpoint["expert"] = self.teacher.fingerprint()

    def _upstream(self) -> dict[str, str]:
        upstream = {"xray-expert": self.teacher.fingerprint(), "xray-index": self.store.fingerprint}
        return upstream | ({"projection": str(PROJECTION_VERSION)} if self.teachers.projection > 0 else {})

    def finish(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Save the student, and evaluate it with the expert's prompts on CT `val` if there are labels."""
        assert isinstance(datamodule, CTDataModule)
        upstream, spec = self._upstream(), datamodule.volume.to_config()
        run_on_rank_zero(lambda: save_ct_encoder(folder / ARTEFACT, self.encoder, self.projection, upstream, spec))
        metrics: dict[str, Any] = last_values(self)
        metrics["tau"] = self.tau
        val = datamodule.manifest.split("val")
        if len(val) and datamodule.manifest.finding_names and self.teacher.has_joint_space:
            predictions = predict_rows(trainer, self, datamodule.loader(val), list(val.frame.index))
            names = list(datamodule.manifest.finding_names)
            positive, negative = prompt_features(self.teacher.encode_text, names, "normal")
            scale = self.teacher.logit_scale or 1.0
            scores = pair_probabilities(predictions["features"], positive.cpu(), negative.cpu(), scale)
            studies, means = study_means(val, scores.numpy())
            labels = studies[[f"label:{name}" for name in names]].to_numpy()
            report = classification_report(labels, means, names, studies["patient_id"].tolist())
            metrics["macro_auroc"] = report["macro_auroc"]
        return metrics
