"""Evidence of false negatives in stage 3: computed once for the training studies, then looked up per batch.

The evidence comes from frozen models, from texts, or from a moving average of the model. Labels are used for logging
only.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.distributed import gather_with_gradient
from ctx_distill.errors import InputError
from ctx_distill.losses.contrastive import contrastive_loss, study_targets
from ctx_distill.losses.false_negatives import (
    Correction,
    CorrectionMode,
    EvidenceKind,
    contradictions,
    correct,
    ema_evidence,
    findings_evidence,
    identification_quality,
    identify,
    report_evidence,
    retrieved_evidence,
    sample_similarities,
    threshold_from_quantile,
)
from ctx_distill.retrieval.lookup import NeighbourLookup
from ctx_distill.seeds import run_seed
from ctx_distill.stages.align.corrected_pairs import CorrectedPairs
from ctx_distill.stages.align.moving_average import MovingAverage
from ctx_distill.stages.align.training_reports import TrainingReports
from ctx_distill.stages.shared.shared_extraction import extract_shared
from ctx_distill.training.predictions import join_rows
from ctx_distill.types import CTBatch

PAIRS = 200_000
"""Training pairs sampled for a quantile."""
MEASURED_VOLUMES = 512
"""Training volumes that the moving average encodes for its quantile (260,000 pairs)."""


@dataclass(frozen=True)
class RobustSettings:
    """How false negatives are identified and corrected (RoCo; thresholds and evidence are **ours**).

    Attributes:
        evidence: Enabled kinds of evidence; an empty tuple gives plain InfoNCE.
        mode: `relabel`, `mask` or `soft`.
        combine: Whether a pair must pass the threshold of `any` or of `all` kinds.
        quantile: Share of training pairs below the threshold of cosine evidence.
        thresholds: Absolute thresholds by kind, which override the quantile.
        weight: Weight of a relabelled pair, relative to 1 for a true pair.
        warmup_epochs: Epochs in which pairs are identified but not corrected.
        vocabulary: Findings to extract from the texts.
        ema_decay: Decay of the moving average that provides the evidence `ema`.
    """

    evidence: tuple[EvidenceKind, ...] = ("report",)
    mode: CorrectionMode = "relabel"
    combine: Literal["any", "all"] = "any"
    quantile: float = 0.95
    thresholds: dict[str, float] = field(default_factory=dict)
    weight: float = 0.5
    warmup_epochs: int = 1
    vocabulary: str = "ct-rate"
    ema_decay: float = 0.99

    def needs_moving_average(self) -> bool:
        """Return whether evidence `ema` is enabled.

        Raises:
            InputError: Its threshold is a quantile, but there is no warm-up after which to measure it.
        """
        if "ema" not in self.evidence:
            return False
        if "ema" not in self.thresholds and self.warmup_epochs < 1:
            raise InputError(
                f"stage 3: the threshold of evidence ema is measured after the warm-up, but robust.warmup_epochs"
                f" is {self.warmup_epochs}. Set robust.warmup_epochs=1 or more, or robust.thresholds.ema."
            )
        return True


class FalseNegatives:
    """Identify and correct false negatives of a batch with evidence about the training studies.

    Thresholds are quantiles over pairs of training studies, never over `val`, `test` or a batch. For frozen evidence they
    are fixed before training. For `ema`, the quantile is measured after the warm-up, before the first correction, because
    the scores of an untrained model say nothing about later ones; until then `ema` suspects no pair (**ours**).

    Attributes:
        settings: See `RobustSettings`.
        thresholds: Thresholds of the frozen kinds.
        moving_average: Provides `ema`, or None.
        counts: Counts of the current epoch, for logging; kept on the device to avoid synchronisation.
        pairs: Record of suspected and corrected pairs over the stage.
    """

    def __init__(
        self,
        settings: RobustSettings,
        reports: TrainingReports,
        lookup: NeighbourLookup,
        moving_average: MovingAverage | None = None,
    ) -> None:
        """Compute the evidence tables and the thresholds.

        Args:
            settings: See `RobustSettings`.
            reports: Reports of the training studies.
            lookup: Retrieves each report's X-ray features.
            moving_average: Provides `ema`.
        """
        self.settings, self.reports, self.moving_average = settings, reports, moving_average
        self.tables: dict[str, Tensor] = {}
        self.thresholds: dict[str, float] = {}
        for kind in settings.evidence:
            if kind == "ema":
                continue
            if kind == "findings":
                self.tables[kind] = torch.from_numpy(extract_shared(reports.reports, settings.vocabulary))
                self.thresholds[kind] = settings.thresholds.get(kind, 1.0)
                continue
            table = reports.embeddings if kind == "report" else reports.retrieved(lookup)
            self.tables[kind] = table
            fixed = settings.thresholds.get(kind)
            self.thresholds[kind] = self._quantile(table, table, reports.study) if fixed is None else fixed
        self.counts: defaultdict[str, Tensor | int] = defaultdict(int)
        self.pairs = CorrectedPairs(settings.evidence)
        self.known = torch.from_numpy(reports.has_report)

    def _quantile(self, rows: Tensor, columns: Tensor, study: Tensor) -> float:
        similarities = sample_similarities(rows, columns, study=study, pairs=PAIRS, seed=run_seed())
        return threshold_from_quantile(similarities, self.settings.quantile)

    def features(self, batch: CTBatch) -> dict[str, Tensor]:
        """Return the evidence features of this rank's rows; gather each before calling `corrections`."""
        places, device = self.reports.places(batch.row), batch.row.device
        features = {kind: table[places].to(device) for kind, table in self.tables.items()}
        features["known"] = self.known[places].to(device)
        features["identity"] = self.reports.identity[places].to(device)
        if self.moving_average is not None and math.isfinite(self.moving_average.threshold):
            image, text = self.moving_average.encode(batch.volume, batch.report)
            features |= {"ema_image": image, "ema_text": text}
        return features

    def needs_threshold(self, epoch: int) -> bool:
        """Return whether the warm-up is over and the moving average has no threshold yet."""
        copy = self.moving_average
        return copy is not None and epoch >= self.settings.warmup_epochs and not math.isfinite(copy.threshold)

    def measure_threshold(self, datamodule: CTDataModule) -> float:
        """Return the quantile of the moving average's scores over pairs of sampled training studies (collective)."""
        assert self.moving_average is not None
        train = datamodule.training_rows()
        outputs = []
        # Neither sampling nor loading may change the random state of the rest of the stage.
        with torch.random.fork_rng(devices=[]):
            drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(run_seed()))[:MEASURED_VOLUMES]
            taken = np.zeros(len(train), dtype=bool)
            taken[drawn.numpy()] = True
            measured = train.where(taken)
            for batch in datamodule.loader(measured):
                assert isinstance(batch, CTBatch)
                image, text = self.moving_average.encode(batch.volume, batch.report)
                outputs.append({"image": image, "text": text, "study": batch.study, "row": batch.row})
        rows = join_rows(outputs, list(measured.frame.index), self.moving_average.threshold.device)
        return self._quantile(rows["image"].float(), rows["text"].float(), rows["study"])

    def fix_threshold(self, threshold: float) -> None:
        """Set the moving average's threshold for the rest of the stage."""
        assert self.moving_average is not None
        self.moving_average.threshold.fill_(threshold)

    def all_thresholds(self) -> dict[str, float]:
        """Return the current thresholds by kind; infinite if not yet measured."""
        if self.moving_average is None:
            return self.thresholds
        return {**self.thresholds, "ema": float(self.moving_average.threshold)}

    def corrections(self, features: dict[str, Tensor], study: Tensor, epoch: int) -> tuple[Correction, Tensor]:
        """Return the corrected targets of the global batch.

        Args:
            features: Gathered `features`.
            study: (B,) gathered.
            epoch: Current epoch; nothing is corrected in the first `warmup_epochs`.

        Returns:
            The correction, and the suspected pairs (B, B) bool.
        """
        return self._correct(self._evidence(features, study), features["identity"], study, epoch)

    def _evidence(self, features: dict[str, Tensor], study: Tensor) -> dict[str, Tensor]:
        """Return the evidence (B, B) by kind."""
        evidence: dict[str, Tensor] = {}
        for kind in self.settings.evidence:
            if kind == "findings":
                evidence[kind] = findings_evidence(features[kind], features["known"])
            elif kind == "report":
                evidence[kind] = report_evidence(features[kind])
            elif kind == "retrieved":
                evidence[kind] = retrieved_evidence(features[kind])
            elif "ema_image" in features:
                evidence[kind] = ema_evidence(features["ema_image"], features["ema_text"])
            else:  # no threshold yet
                evidence[kind] = torch.zeros(len(study), len(study), device=study.device)
        return evidence

    def _correct(
        self, evidence: dict[str, Tensor], identity: Tensor, study: Tensor, epoch: int
    ) -> tuple[Correction, Tensor]:
        settings = self.settings
        suspects, strength = identify(evidence, self.all_thresholds(), settings.combine)
        watch = epoch < settings.warmup_epochs
        correction = correct(
            study_targets(study), suspects, strength, settings.mode, settings.weight, watch, identity=identity
        )
        return correction, suspects

    def loss(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        study: Tensor,
        batch: CTBatch,
        epoch: int,
        chunk: int | None = None,
    ) -> dict[str, Tensor]:
        """Return InfoNCE with corrected targets, and count the suspected and corrected pairs.

        Args:
            image: (B, D) gathered.
            text: (B, D) gathered.
            logit_scale: (), exponentiated.
            study: (B,) gathered.
            batch: This rank's rows.
            epoch: Current epoch.
            chunk: See `contrastive_loss`; the corrections always take (B, B).

        Returns:
            See `contrastive_loss`.
        """
        gathered = {name: gather_with_gradient(value) for name, value in self.features(batch).items()}
        evidence = self._evidence(gathered, study)
        correction, suspects = self._correct(evidence, gathered["identity"], study, epoch)
        counts = self.counts
        counts["suspected"] += correction.suspected
        counts["corrected"] += correction.corrected
        counts["pairs"] += len(study) * (len(study) - 1)
        labels = contradicted = None
        if batch.labels is not None and batch.labels.shape[1]:
            labels = gather_with_gradient(batch.labels)
            contradicted = contradictions(labels)
            quality = identification_quality(suspects, labels, study, contradicted)
            for name, count in {"hits": "hits", "scored": "suspected", "actual": "actual"}.items():
                counts[name] += quality[count]
        self.pairs.observe(correction, evidence, study, labels, contradicted, epoch)
        return contrastive_loss(
            image, text, logit_scale, targets=correction.targets, text_targets=correction.text_targets,
            denominator=correction.denominator, chunk=chunk,
        )  # fmt: skip

    def drain_counts(self) -> dict[str, float]:
        """Return and reset the counts since the last call, over all global batches; the same on every rank.

        Returns:
            `suspected_pairs`, `corrected_pairs` (ordered pairs of different studies), `suspected_share`,
            `corrected_share` (of all ordered pairs), and, with labels, `false_negative_precision` and
            `false_negative_recall`.
        """
        counts = defaultdict(float, {name: float(count) for name, count in self.counts.items()})
        self.counts = defaultdict(int)
        values = {"suspected_pairs": counts["suspected"], "corrected_pairs": counts["corrected"]}
        shares = {
            "suspected_share": ("suspected", "pairs"),
            "corrected_share": ("corrected", "pairs"),
            "false_negative_precision": ("hits", "scored"),
            "false_negative_recall": ("hits", "actual"),
        }
        return values | {name: counts[part] / counts[whole] for name, (part, whole) in shares.items() if counts[whole]}
