"""The report decoder's loss: next-token cross-entropy, averaged over the tokens of all ranks."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ctx_distill.distributed import global_mean
from ctx_distill.losses.contrastive import working_precision

IGNORE = -100
"""Target of a position without loss (padding, the prompt), as in Hugging Face models."""


def report_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> dict[str, Tensor]:
    """Return the mean cross-entropy over the scored tokens of the global batch.

    Args:
        logits: (B, T, V) for this rank's reports; position t predicts targets[:, t] (shift before).
        targets: (B, T) int64, `IGNORE` where not scored.
        label_smoothing: In [0, 1).

    Returns:
        `total`, (): equal on all ranks, with the gradient of a single process. A mean of the ranks' means would be a
        different loss, because reports differ in length.
    """
    flat = targets.reshape(-1)
    terms = F.cross_entropy(
        working_precision(logits).flatten(0, 1),  # a rank may hold no report
        flat,
        ignore_index=IGNORE,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return {"total": global_mean(terms, (flat != IGNORE).to(terms.dtype))}
