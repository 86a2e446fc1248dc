"""The loss of entity-focused masking: cross-entropy of the chosen tokens, averaged over all ranks' chosen tokens.

In two steps, so that a batch may be encoded in parts: sums a report, which need no other report, and their mean over
the global batch.

    L_efm = sum_{i, t in M_i} -log p(w_it | masked r_i, tokens of V_i) / sum_i |M_i|
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ctx_distill.distributed import gather_with_gradient, global_ratio
from ctx_distill.losses.contrastive import working_precision

COUNTS = ("entity", "other", "entity_right", "other_right")
"""Columns of the counts: chosen tokens of entities and of other words, and how many of each were predicted."""


def masked_language_sums(
    logits: Tensor, targets: Tensor, entity: Tensor, owner: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """What each report adds to the loss.

    Args:
        logits: (N, V) of the chosen tokens.
        targets: (N,) int64, what stood there.
        entity: (N,) bool, whether it belongs to an entity.
        owner: (N,) int64, the report, in 0 ... B - 1.
        rows: B.

    Returns:
        (B,) the summed cross-entropy, and (B, 4) int64 counts (`COUNTS`), without a gradient; 0 for a report without
        chosen tokens.
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
    """Mean cross-entropy over the chosen tokens of the global batch.

    Args:
        sums: (b,) this rank's summed cross-entropies.
        counts: (b, 4), this rank's.

    Returns:
        `total`: equal on all ranks, with the gradient of one process; 0 where nothing was chosen. `accuracy`,
        `accuracy_entity`, `accuracy_other`: share predicted right, NaN where there is none of the kind.
    """
    chosen = (counts[:, 0] + counts[:, 1]).to(sums.dtype)
    entity, other, entity_right, other_right = gather_with_gradient(counts).sum(0).to(sums.dtype)
    return {
        "total": global_ratio(sums, chosen),
        "accuracy": (entity_right + other_right) / (entity + other),
        "accuracy_entity": entity_right / entity,
        "accuracy_other": other_right / other,
    }
