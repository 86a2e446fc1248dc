"""The loss of entity-focused masking: cross-entropy averaged over the chosen tokens of all ranks.

The loss is computed in two steps, so that a batch can be encoded in parts: sums per report, and their mean over the
global batch.

    L_efm = sum_{i, t in M_i} -log p(w_it | masked r_i, tokens of V_i) / sum_i |M_i|
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ctx_distill.distributed import gather_with_gradient, global_ratio
from ctx_distill.losses.contrastive import working_precision

COUNTS = ("entity", "other", "entity_right", "other_right")
"""Columns of the counts: chosen tokens of entities and of other words, and how many of each were predicted correctly."""


def masked_language_sums(
    logits: Tensor, targets: Tensor, entity: Tensor, owner: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """Return each report's contribution to the loss.

    Args:
        logits: (N, V) of the chosen tokens.
        targets: (N,) int64, the original tokens.
        entity: (N,) bool, whether the token belongs to an entity.
        owner: (N,) int64, index of the token's report, in 0 ... B - 1.
        rows: B.

    Returns:
        The summed cross-entropy (B,), and the counts (B, 4) int64 (`COUNTS`), without a gradient. Both are 0 for a
        report without chosen tokens.
    """
    logits = working_precision(logits)
    terms = F.cross_entropy(logits, targets, reduction="none")
    right = logits.detach().argmax(dim=1) == targets
    counts = torch.stack([entity, ~entity, entity & right, ~entity & right], dim=1).long()
    return (
        terms.new_zeros(rows).index_add(0, owner, terms),
        counts.new_zeros(rows, len(COUNTS)).index_add(0, owner, counts),
    )


def masked_language_loss(sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Return the mean cross-entropy over the chosen tokens of the global batch.

    Args:
        sums: (b,), this rank's summed cross-entropies.
        counts: (b, 4), this rank's counts.

    Returns:
        `total`: equal on all ranks, with the gradient of a single process; 0 if no token was chosen. `accuracy`,
        `accuracy_entity`, `accuracy_other`: share predicted correctly, NaN without tokens of the kind.
    """
    chosen = (counts[:, 0] + counts[:, 1]).to(sums.dtype)
    entity, other, entity_right, other_right = gather_with_gradient(counts).sum(0).to(sums.dtype)
    return {
        "total": global_ratio(sums, chosen),
        "accuracy": (entity_right + other_right) / (entity + other),
        "accuracy_entity": entity_right / entity,
        "accuracy_other": other_right / other,
    }
