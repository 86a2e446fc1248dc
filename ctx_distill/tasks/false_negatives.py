"""Evidence of false negatives for stage 3: fixed on the training studies before the stage, looked up a batch.

Everything here comes from frozen models and from texts. Labels are read for the log alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ctx_distill.errors import InputError
from ctx_distill.losses.contrastive import study_targets
from ctx_distill.losses.robust import (
    Correction,
    CorrectionMode,
    correct,
    findings_evidence,
    identify,
    report_evidence,
    retrieved_evidence,
    sample_similarities,
    threshold_from_quantile,
)
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.retrieval.lookup import NeighbourLookup
from ctx_distill.text.findings import extract_many, load_vocabulary

Evidence = Literal["report", "findings", "retrieved"]


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
    """

    evidence: tuple[Evidence, ...] = ("report",)
    mode: CorrectionMode = "relabel"
    combine: Literal["any", "all"] = "any"
    quantile: float = 0.95
    thresholds: dict[str, float] = field(default_factory=dict)
    weight: float = 0.5
    warmup_epochs: int = 1
    vocabulary: str = "ct-rate"


class FalseNegatives:
    """Evidence of the training studies, and the corrections of a batch.

    Args:
        settings: what is switched on.
        rows: N manifest rows of training images.
        study: (N,) integer a study.
        reports: N texts.
        expert: the frozen expert, which embeds the reports.
        lookup: gives each report's retrieved X-ray features.
    """

    def __init__(
        self,
        settings: RobustSettings,
        rows: Sequence[int],
        study: Tensor,
        reports: Sequence[str],
        expert: XrayExpert,
        lookup: NeighbourLookup,
    ) -> None:
        self.settings = settings
        self.position = {int(row): index for index, row in enumerate(rows)}
        self.tables: dict[str, Tensor] = {}
        self.thresholds: dict[str, float] = {}
        embedded = _embed(expert, reports) if {"report", "retrieved"} & set(settings.evidence) else None
        for kind in settings.evidence:
            if kind == "findings":
                self.tables[kind] = torch.from_numpy(extract_many(reports, load_vocabulary(settings.vocabulary)))
                self.thresholds[kind] = settings.thresholds.get(kind, 1.0)
                continue
            if embedded is None:
                raise InputError(f"unknown false-negative evidence {kind!r}; expected report, findings or retrieved.")
            table = embedded if kind == "report" else lookup(embedded)["features"].cpu()
            self.tables[kind] = table
            given = settings.thresholds.get(kind)
            self.thresholds[kind] = (
                given
                if given is not None
                else threshold_from_quantile(sample_similarities(table, study=study, pairs=200_000), settings.quantile)
            )
        self.known = torch.tensor([bool(text) for text in reports])

    def features(self, rows: Tensor) -> dict[str, Tensor]:
        """What this rank's rows bring to the global batch: gather each, then call `corrections`."""
        index = torch.tensor([self.position[int(row)] for row in rows])
        picked = {kind: table[index].to(rows.device) for kind, table in self.tables.items()}
        return {**picked, "known": self.known[index].to(rows.device)}

    def corrections(self, features: dict[str, Tensor], study: Tensor, epoch: int) -> tuple[Correction, Tensor]:
        """Targets of the global batch.

        Args:
            features: gathered `features`.
            study: (B,) gathered.
            epoch: the current one; the first `warmup_epochs` only watch.

        Returns:
            The correction and the suspects (B, B) bool.
        """
        evidence = {}
        for kind in self.tables:
            if kind == "findings":
                evidence[kind] = findings_evidence(features[kind], features["known"])
            elif kind == "report":
                evidence[kind] = report_evidence(features[kind])
            else:
                evidence[kind] = retrieved_evidence(features[kind])
        suspects, strength = identify(evidence, self.thresholds, self.settings.combine)
        watch = epoch < self.settings.warmup_epochs
        settings = self.settings
        correction = correct(study_targets(study), suspects, strength, settings.mode, settings.weight, watch)
        return correction, suspects


def _embed(expert: XrayExpert, reports: Sequence[str], batch: int = 64) -> Tensor:
    with torch.no_grad():
        parts = [expert.encode_text(reports[start : start + batch]).cpu() for start in range(0, len(reports), batch)]
    return torch.cat(parts)
