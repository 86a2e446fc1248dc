"""Evidence of false negatives for stage 3: fixed on the training studies before the stage, looked up a batch.

Everything here comes from frozen models and from texts, or from a moving average of the model itself. Labels are read
for the log alone.
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
"""Training pairs that a quantile is taken of."""
MEASURED_VOLUMES = 512
"""Training volumes that the moving average encodes for its quantile: 260,000 pairs, in a fraction of an epoch."""


@dataclass(frozen=True)
class RobustSettings:
    """How false negatives are found and corrected (RoCo; thresholds and evidence are ours).

    Attributes:
        evidence: kinds that are switched on; none gives plain InfoNCE.
        mode: `relabel`, `mask` or `soft`.
        combine: suspected by `any` kind, or by `all`.
        quantile: share of training pairs below the threshold of a cosine evidence.
        thresholds: absolute thresholds by kind, in place of the quantile.
        weight: of a relabelled pair, against 1 of a true one.
        warmup_epochs: epochs that only watch.
        vocabulary: findings that are read from the texts.
        ema_decay: of the moving average that gives the evidence `ema`.
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
        """Whether `ema` is switched on.

        Raises:
            InputError: its threshold is a quantile, and there is no warm-up to measure it after.
        """
        if "ema" not in self.evidence:
            return False
        if "ema" not in self.thresholds and self.warmup_epochs < 1:
            raise InputError(
                f"stage 3: evidence ema takes its threshold from the model after the warm-up, but robust.warmup_epochs"
                f" is {self.warmup_epochs}. Set robust.warmup_epochs=1 or more, or robust.thresholds.ema."
            )
        return True


class FalseNegatives:
    """Evidence of the training studies, and the corrections of a batch.

    Thresholds come from pairs of training studies, never from `val`, `test` or a batch. Those of the frozen kinds are
    fixed before the stage. The moving average's scores mean little until it has learnt, so that a quantile of them
    fixed then would be of other scores than those it is used on: it is taken once the warm-up is over, before the
    first correction, and the moving average suspects nothing until then (**ours**).

    Attributes:
        settings: what is switched on.
        thresholds: of the frozen kinds.
        moving_average: gives `ema`, or None.
        counts: of the epoch so far, for the log; on the device, so that no step waits for them.
        pairs: which pairs were suspected and corrected, of the whole stage.
    """

    def __init__(
        self,
        settings: RobustSettings,
        reports: TrainingReports,
        lookup: NeighbourLookup,
        moving_average: MovingAverage | None = None,
    ) -> None:
        """Make the tables and fix the thresholds.

        Args:
            settings: what is switched on.
            reports: of the training studies.
            lookup: gives each report's retrieved X-ray features.
            moving_average: gives `ema`.
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
            given = settings.thresholds.get(kind)
            self.thresholds[kind] = self._quantile(table, table, reports.study) if given is None else given
        self.counts: defaultdict[str, Tensor | int] = defaultdict(int)
        self.pairs = CorrectedPairs(settings.evidence)
        self.known = torch.from_numpy(reports.has_report)

    def _quantile(self, rows: Tensor, columns: Tensor, study: Tensor) -> float:
        drawn = sample_similarities(rows, columns, study=study, pairs=PAIRS, seed=run_seed())
        return threshold_from_quantile(drawn, self.settings.quantile)

    def features(self, batch: CTBatch) -> dict[str, Tensor]:
        """What this rank's rows bring to the global batch: gather each, then call `corrections`."""
        places, device = self.reports.places(batch.row), batch.row.device
        brought = {kind: table[places].to(device) for kind, table in self.tables.items()}
        brought["known"] = self.known[places].to(device)
        brought["identity"] = self.reports.identity[places].to(device)
        if self.moving_average is not None and math.isfinite(self.moving_average.threshold):
            image, text = self.moving_average.encode(batch.volume, batch.report)
            brought |= {"ema_image": image, "ema_text": text}
        return brought

    def needs_threshold(self, epoch: int) -> bool:
        """Whether the warm-up is over and the moving average has no threshold yet."""
        copy = self.moving_average
        return copy is not None and epoch >= self.settings.warmup_epochs and not math.isfinite(copy.threshold)

    def measure_threshold(self, datamodule: CTDataModule) -> float:
        """The quantile of the moving average's scores over pairs of (some) training studies; collective."""
        assert self.moving_average is not None
        train = datamodule.training_rows()
        outputs = []
        # Neither the sample nor its reading may move the random state that the rest of the stage draws from.
        with torch.random.fork_rng(devices=[]):
            drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(run_seed()))[:MEASURED_VOLUMES]
            taken = np.zeros(len(train), dtype=bool)
            taken[drawn.numpy()] = True
            measured = train.where(taken)
            for batch in datamodule.loader(measured):
                assert isinstance(batch, CTBatch)
                image, text = self.moving_average.encode(batch.volume, batch.report)
                outputs.append({"image": image, "text": text, "study": batch.study, "row": batch.row})
        found = join_rows(outputs, list(measured.frame.index), self.moving_average.threshold.device)
        return self._quantile(found["image"].float(), found["text"].float(), found["study"])

    def fix_threshold(self, threshold: float) -> None:
        """Set the moving average's threshold for the rest of the stage."""
        assert self.moving_average is not None
        self.moving_average.threshold.fill_(threshold)

    def all_thresholds(self) -> dict[str, float]:
        """Those that are in force now, by kind; infinite where none is yet."""
        if self.moving_average is None:
            return self.thresholds
        return {**self.thresholds, "ema": float(self.moving_average.threshold)}

    def corrections(self, features: dict[str, Tensor], study: Tensor, epoch: int) -> tuple[Correction, Tensor]:
        """Targets of the global batch.

        Args:
            features: gathered `features`.
            study: (B,) gathered.
            epoch: the current one; the first `warmup_epochs` only watch.

        Returns:
            The correction and the suspects (B, B) bool.
        """
        return self._correct(self._evidence(features, study), features["identity"], study, epoch)

    def _evidence(self, features: dict[str, Tensor], study: Tensor) -> dict[str, Tensor]:
        """(B, B) by kind."""
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
        """InfoNCE with corrected targets; what is suspected and corrected is counted for the log.

        Args:
            image: (B, D) gathered.
            text: (B, D) gathered.
            logit_scale: (), exponentiated.
            study: (B,) gathered.
            batch: this rank's rows.
            epoch: the current one.
            chunk: see `contrastive_loss`; the corrections themselves are (B, B).

        Returns:
            What `contrastive_loss` gives.
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
        """Counts since the last call over all global batches, the same on every rank.

        Returns:
            `suspected_pairs`, `corrected_pairs` (ordered pairs of different studies), `suspected_share`,
            `corrected_share` (of all ordered pairs), and, where labels say so, `false_negative_precision` and
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
