"""Soft targets from report similarities: a baseline of robust contrastive learning.

    T = (1 - w) T_study + w softmax_j( <q_i, q_j> / tau )

q are frozen embeddings of the reports. Mixing hard targets with a softmax of similarities within one modality follows
SoftCLIP (Gao et al. 2023, arXiv 2303.17561); using report similarities for both directions follows MedCLIP (Wang et al.
2022, arXiv 2210.10163). There are no thresholds and no corrections: every pair gets a share. `contrastive_loss` uses T in
both directions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ctx_distill.losses.contrastive import contrastive_loss, study_targets, working_precision


@torch.no_grad()
def soft_targets(report_embeddings: Tensor, study: Tensor, weight: float, temperature: float) -> Tensor:
    """Return T of the global batch.

    Args:
        report_embeddings: (B, D) frozen embeddings; normalised here.
        study: (B,) int64 study codes; items of one study are positives of each other.
        weight: w in [0, 1]; 0 gives the targets of InfoNCE.
        temperature: Tau.

    Returns:
        (B, B), rows sum to 1.

    Raises:
        ValueError: The weight or the temperature is out of range.
    """
    if not 0 <= weight <= 1 or temperature <= 0:
        raise ValueError(
            f"soft_targets got weight {weight} and temperature {temperature}; expected a weight from 0 to 1 and a "
            "positive temperature"
        )
    unit = F.normalize(working_precision(report_embeddings), dim=-1)
    similar = F.softmax(unit @ unit.T / temperature, dim=1)
    return (1 - weight) * study_targets(study, similar.dtype) + weight * similar


def soft_target_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    report_embeddings: Tensor,
    study: Tensor,
    weight: float,
    temperature: float,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Return InfoNCE against `soft_targets`; for arguments, results and errors see there and `contrastive_loss`."""
    targets = soft_targets(report_embeddings, study, weight, temperature)
    return contrastive_loss(
        image_features, text_features, logit_scale, targets=targets, text_targets=targets, chunk=chunk
    )
