"""A copy of the dual encoder whose weights are an exponential moving average of the trained one's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ctx_distill.models.dual_encoder import DualEncoder

VOLUMES_AT_ONCE = 8
"""That the copy encodes: it keeps no graph, so that few are as fast as many."""


class MovingAverage(AveragedModel):
    """The copy, frozen and in eval mode whatever is asked; `update_parameters(model)` moves it on.

    It lies in the checkpoint as part of its task, so that a resumed run goes on with it.

    Attributes:
        threshold: () past which its image-report score makes a pair suspect; infinite until it is fixed.
    """

    threshold: Tensor

    def __init__(self, model: DualEncoder, decay: float, threshold: float | None = None) -> None:
        """Copy the model.

        Args:
            model: what is averaged.
            decay: share of the old average in the new one, a step.
            threshold: where it is known beforehand.
        """
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
        self.requires_grad_(False)
        self.register_buffer("threshold", torch.tensor(math.inf if threshold is None else threshold))
        self.eval()

    def train(self, mode: bool = True) -> MovingAverage:
        """Stay in eval mode."""
        del mode
        super().train(False)
        return self

    @torch.no_grad()
    def encode(self, volume: Tensor, reports: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit features (b, D) of volumes (b, 1, D, H, W), on any device and in any float type, and of b reports."""
        copy = self.module
        assert isinstance(copy, DualEncoder)
        scale = copy.logit_scale
        images = [
            copy.encode_alone(part.to(device=scale.device, dtype=scale.dtype))[0]
            for part in torch.split(volume, VOLUMES_AT_ONCE)
        ]
        return torch.cat(images), copy.encode_text(reports)
