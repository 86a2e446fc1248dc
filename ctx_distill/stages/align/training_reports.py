"""The training studies' reports and what the frozen expert makes of them: once before stage 3, looked up a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ctx_distill.data.manifests.manifest import Manifest
from ctx_distill.losses.pair_order import study_identity
from ctx_distill.models.report_encoder import ReportEncoder
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.retrieval.lookup import NeighbourLookup
from ctx_distill.training.row_tables import PART, RowTables


class TrainingReports:
    """Reports of the rows that a stage trains on; `val` and `test` never come in.

    Attributes:
        study: (N,) int64, an integer a study.
        identity: (N,) int64, a hash of each row's study id, whatever else is in the manifest.
        reports: N texts, made when they are asked for.
        has_report: (N,) bool, which of them are not empty.
    """

    def __init__(
        self, train: Manifest, expert: XrayExpert, queries: ReportEncoder, tables: RowTables | None = None
    ) -> None:
        """Take the training rows.

        Args:
            train: N images.
            expert: the frozen expert, on the device to compute on.
            queries: what the X-ray index is asked with: the expert itself, or the index's own report encoder.
            tables: allocates what has one row per study: 4 D bytes each (2 KB at D = 512) for `embeddings`, and for every
                result of `retrieved`. None keeps all in memory.
        """
        rows = train.rows.tolist()
        self._position = {row: place for place, row in enumerate(rows)}
        self.study = torch.tensor(train.study_codes())
        self.identity = study_identity(train.column("study_id").astype(str).tolist())
        self.reports: Sequence[str] = train.reports()
        self.has_report = train.has_report()
        self.expert, self.queries = expert, queries
        self.tables = RowTables(math.inf) if tables is None else tables

    def __len__(self) -> int:
        return len(self.reports)

    @cached_property
    def embeddings(self) -> Tensor:
        """(N, D_t) unit rows on the CPU: the whole reports in the expert's text space, or in that of the index."""
        return self._encoded(self.expert if self.expert.has_text else self.queries)

    def retrieved(self, lookup: NeighbourLookup) -> Tensor:
        """(N, D_v) unit rows on the CPU: each report's nearest X-rays, mixed as the lookup mixes them."""
        own = self.queries is self.expert or not self.expert.has_text
        asked = self.embeddings if own else self._encoded(self.queries)
        # In parts: a lookup holds the k neighbours of each of its queries in float64.
        return self.tables.collect(
            len(self), (lookup.look_up(asked[i : i + PART])["features"] for i in range(0, len(asked), PART))
        )

    def _encoded(self, encoder: ReportEncoder) -> Tensor:
        parts = (self.reports[start : start + PART] for start in range(0, len(self), PART))
        return self.tables.collect(len(self), (encoder.encode_text(part) for part in parts))

    def places(self, rows: Tensor) -> Tensor:
        """(b,) int64 on the CPU: where manifest rows (b,) stand in what has N rows here."""
        return torch.tensor([self._position[row] for row in rows.tolist()])
