"""Distillation regulariser of stage 3, against forgetting what was distilled in stage 2 (**ours**).

L_reg = mean_i (1 - <h_i, target_i>),   target_i = norm(u*_i + w_p u'_i)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ctx_distill.errors import InputError
from ctx_distill.retrieval.lookup import NeighbourLookup
from ctx_distill.retrieval.store import XrayIndexArtefact
from ctx_distill.stages.align.training_reports import TrainingReports
from ctx_distill.stages.distill.targets import ProjectionTeacher
from ctx_distill.training.row_features import MEMORY_GB
from ctx_distill.types import CTBatch


@dataclass(frozen=True)
class DistillationRegulariserSettings:
    """Settings of the distillation regulariser, which is added to the contrastive loss with `weight`.

    Attributes:
        weight: Weight of the term; 0 disables it.
        projection: w_p, weight of the CT's own projection in the target, relative to 1 for the retrieved X-rays; 0
            disables it. A value above 0 requires `data.init_args.projection=true`.
        k: Retrieved X-rays, averaged with equal weights.
    """

    weight: float = 0.0
    projection: float = 0.0
    k: int = 8


class DistillationRegulariser:
    """Compute the targets of the distillation regulariser: retrieved X-rays, optionally mixed with the projection.

    Both depend on the row only: u* is computed once for all training rows, u' when a row is first used.

    Attributes:
        retrieved: (N, D_v) u* of the training rows, 4 D_v bytes each.
        projection: Computes u', with a bounded cache.
    """

    def __init__(
        self,
        settings: DistillationRegulariserSettings,
        reports: TrainingReports,
        store: XrayIndexArtefact,
        space: int,
        memory_gb: float = MEMORY_GB,
    ) -> None:
        """Look up all training reports.

        Args:
            settings: The settings of the term.
            reports: Reports of the training rows.
            store: The X-ray index.
            space: Dimension of the image features that the term is applied to.
            memory_gb: See `ProjectionTeacher`.

        Raises:
            InputError: `space` differs from the dimension of the X-rays' features.
        """
        if space != store.value_dim:
            raise InputError(
                f"stage 3: keep.weight is {settings.weight}, but the joint space has {space} dimensions and the"
                f" expert's image space has {store.value_dim}. Use the expert's space (text.tower=expert,"
                " text.projection_dim=null), or set keep.weight=0."
            )
        self.settings, self.reports = settings, reports
        self.retrieved = reports.retrieved(NeighbourLookup(store, min(settings.k, len(store)), "mean"))
        self.projection = ProjectionTeacher(memory_gb)

    def targets(self, batch: CTBatch) -> Tensor:
        """Return the targets of a batch, (b, D_v) unit rows on its device.

        Raises:
            InputError: The settings need projections but the batch contains none.
        """
        target = self.retrieved[self.reports.places(batch.row)].to(batch.row.device)
        if self.settings.projection > 0:
            projection = self.projection.targets(batch, self.reports.expert)
            target = F.normalize(target + self.settings.projection * projection, dim=-1)
        return target
