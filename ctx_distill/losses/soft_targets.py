"""Soft targets out of report similarities: the plain baseline of robust contrastive learning.

    T = (1 - w) T_study + w softmax_j( <q_i, q_j> / tau )

q are frozen embeddings of the reports. The form, hard targets mixed with a softmax of similarities within one
modality, is SoftCLIP's (Gao et al. 2023, arXiv 2303.17561); taking the similarities from the reports' side alone, for
both directions, is MedCLIP's (Wang et al. 2022, arXiv 2210.10163). No thresholds, no corrections: every pair gets a
share, however unlike. `ctx_distill.losses.contrastive` compares with T in both directions; the similarity is
symmetric, so that text i to image j has the same targets as image i to text j.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ctx_distill.losses.contrastive import contrastive_loss, study_targets, working_precision


@torch.no_grad()
def soft_targets(report_embeddings: Tensor, study: Tensor, weight: float, temperature: float) -> Tensor:
    """T of the global batch.

    Args:
        report_embeddings: (B, D) frozen, of any length.
        study: (B,) int64, items of one study are positives of each other.
        weight: w in [0, 1]; 0 gives the targets of plain InfoNCE.
        temperature: tau.

    Returns:
        (B, B), rows sum to 1.

    Raises:
        ValueError: the weight or the temperature is out of range.
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
    """InfoNCE against `soft_targets`; what it takes and gives, and the errors, are theirs and `contrastive_loss`'s."""
    targets = soft_targets(report_embeddings, study, weight, temperature)
    return contrastive_loss(
        image_features, text_features, logit_scale, targets=targets, text_targets=targets, chunk=chunk
    )
