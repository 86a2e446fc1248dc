"""The training studies' reports and what the frozen expert makes of them: once before stage 3, looked up a batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ctx_distill.data.manifest import Manifest
from ctx_distill.models.report_encoder import ReportEncoder
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.retrieval.lookup import NeighbourLookup


class TrainingReports:
    """Reports of the rows that a stage trains on; `val` and `test` never come in.

    Attributes:
        study: (N,) int64, an integer a study.
        reports: N texts, made when they are asked for.
        has_report: (N,) bool, which of them are not empty.
    """

    def __init__(self, train: Manifest, expert: XrayExpert, queries: ReportEncoder) -> None:
        """Take the training rows.

        Args:
            train: N images.
            expert: the frozen expert, on the device to compute on.
            queries: what the X-ray index is asked with: the expert itself, or the index's own report encoder.
        """
        rows = train.rows.tolist()
        self._position = {row: place for place, row in enumerate(rows)}
        self.study = torch.tensor(train.study_codes())
        self.reports: Sequence[str] = train.reports()
        self.has_report = train.has_report()
        self.expert, self.queries = expert, queries

    def __len__(self) -> int:
        return len(self.reports)

    @cached_property
    def embeddings(self) -> Tensor:
        """(N, D_t) unit rows on the CPU: the whole reports in the expert's text space, or in that of the index."""
        return (self.expert if self.expert.has_text else self.queries).encode_text(self.reports).cpu()

    def retrieved(self, lookup: NeighbourLookup) -> Tensor:
        """(N, D_v) unit rows on the CPU: each report's nearest X-rays, mixed as the lookup mixes them."""
        own = self.queries is self.expert or not self.expert.has_text
        return lookup(self.embeddings if own else self.queries.encode_text(self.reports).cpu())["features"].cpu()

    def places(self, rows: Tensor) -> Tensor:
        """(b,) int64 on the CPU: where manifest rows (b,) stand in what has N rows here."""
        return torch.tensor([self._position[int(row)] for row in rows])
