"""The training reports and their frozen embeddings: computed once before stage 3, then looked up per batch."""

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
    """Reports of the training rows; `val` and `test` are never included.

    Attributes:
        study: (N,) int64, study codes.
        identity: (N,) int64, a hash of each row's study id, independent of the rest of the manifest.
        reports: N texts, created on access.
        has_report: (N,) bool, whether a text is not empty.
    """

    def __init__(
        self, train: Manifest, expert: XrayExpert, queries: ReportEncoder, tables: RowTables | None = None
    ) -> None:
        """Store the training rows.

        Args:
            train: N images.
            expert: The frozen expert, on the device to compute on.
            queries: Encoder of the index's queries: the expert, or the index's separate report encoder.
            tables: Allocates the tables with one row per study, 4 D bytes each (2 KB at D = 512): `embeddings`, and
                every result of `retrieved`. None keeps them in memory.
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
        """Unit rows (N, D_t) on the CPU: the complete reports in the expert's text space, or else in the index's."""
        return self._encoded(self.expert if self.expert.has_text else self.queries)

    def retrieved(self, lookup: NeighbourLookup) -> Tensor:
        """Return the mixed features of each report's nearest X-rays, (N, D_v) unit rows on the CPU."""
        same_space = self.queries is self.expert or not self.expert.has_text
        queries = self.embeddings if same_space else self._encoded(self.queries)
        # In parts, because a lookup holds the k neighbours of each query in float64.
        return self.tables.collect(
            len(self), (lookup.look_up(queries[i : i + PART])["features"] for i in range(0, len(queries), PART))
        )

    def _encoded(self, encoder: ReportEncoder) -> Tensor:
        parts = (self.reports[start : start + PART] for start in range(0, len(self), PART))
        return self.tables.collect(len(self), (encoder.encode_text(part) for part in parts))

    def places(self, rows: Tensor) -> Tensor:
        """Return the positions (b,) int64, on the CPU, of manifest rows (b,) in tables of N rows."""
        return torch.tensor([self._position[row] for row in rows.tolist()])
