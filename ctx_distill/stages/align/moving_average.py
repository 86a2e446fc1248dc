"""An exponential moving average of the dual encoder's weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ctx_distill.models.dual_encoder import DualEncoder

VOLUMES_AT_ONCE = 8
"""Volumes per forward pass of the copy; without a graph, small batches are as fast as large ones."""


class MovingAverage(AveragedModel):
    """A frozen copy that always stays in eval mode; `update_parameters(model)` updates it.

    It is a submodule of its task, so checkpoints contain it and a resumed run continues with it.

    Attributes:
        threshold: (), the image-report score above which a pair is suspected; infinite until it is measured.
    """

    threshold: Tensor

    def __init__(self, model: DualEncoder, decay: float, threshold: float | None = None) -> None:
        """Copy the model.

        Args:
            model: The model to average.
            decay: Weight of the old average per update.
            threshold: The threshold, if it is known in advance.
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
        """Return unit features (b, D) of volumes (b, 1, D, H, W), on any device and of any float type, and of b reports."""
        copy = self.module
        assert isinstance(copy, DualEncoder)
        scale = copy.logit_scale
        images = [
            copy.encode_alone(part.to(device=scale.device, dtype=scale.dtype))[0]
            for part in torch.split(volume, VOLUMES_AT_ONCE)
        ]
        return torch.cat(images), copy.encode_text(reports)
