"""Stage 3 goes on distilling a little, so that what the X-ray expert taught is not forgotten (**ours**)."""

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
class KeepSettings:
    """A pair-wise distillation term beside the contrastive one: weight * mean_i (1 - <image feature_i, target_i>).

    Attributes:
        weight: of the term; 0 switches it off.
        projection: part of the CT's own projection in the target, against 1 of the retrieved X-rays; 0 leaves it out.
            It needs `data.init_args.projection=true`.
        k: retrieved X-rays, mixed alike.
    """

    weight: float = 0.0
    projection: float = 0.0
    k: int = 8


class KeepTargets:
    """target_i = norm(u*_i + projection u'_i): retrieved X-rays, and the CT's own projection through the expert.

    Both depend on the row alone: u* is computed once for all training rows, u' when a row is first seen.

    Attributes:
        retrieved: (N, D_v) u* of the training rows, 4 D_v bytes each.
        projection: u', kept within a limit.
    """

    def __init__(
        self,
        settings: KeepSettings,
        reports: TrainingReports,
        store: XrayIndexArtefact,
        space: int,
        memory_gb: float = MEMORY_GB,
    ) -> None:
        """Look all training reports up.

        Args:
            settings: what is switched on.
            reports: of the training rows.
            store: the X-ray index.
            space: dimension of the features that are to be near the targets.
            memory_gb: see `ProjectionTeacher`.

        Raises:
            InputError: they do not lie in the space of the X-rays' features.
        """
        if space != store.value_dim:
            raise InputError(
                f"stage 3: keep.weight is {settings.weight}, but the joint space has {space} dimensions and the"
                f" expert's image space {store.value_dim}. Keep the expert's own space (text.tower=expert,"
                " text.projection_dim=null), or set keep.weight=0."
            )
        self.settings, self.reports = settings, reports
        self.retrieved = reports.retrieved(NeighbourLookup(store, min(settings.k, len(store)), "mean"))
        self.projection = ProjectionTeacher(memory_gb)

    def targets(self, batch: CTBatch) -> Tensor:
        """(b, D_v) unit rows on the batch's device.

        Raises:
            InputError: the projection is asked for and the batch has none.
        """
        target = self.retrieved[self.reports.places(batch.row)].to(batch.row.device)
        if self.settings.projection > 0:
            own = self.projection.targets(batch, self.reports.expert)
            target = F.normalize(target + self.settings.projection * own, dim=-1)
        return target
