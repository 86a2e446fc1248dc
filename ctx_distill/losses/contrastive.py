"""InfoNCE between images and reports, with several positives per row, soft targets and chunked logits.

    l_ij = s <h_i, t_j>
    L_image_to_text = mean_i - sum_j T_ij log( exp l_ij / sum_{j' kept} exp l_ij' )
    L_text_to_image = the same over columns,   L = (L_image_to_text + L_text_to_image) / 2

If T is the identity, this is CLIP's loss (Radford et al. 2021, arXiv 2103.00020; `open_clip.loss.ClipLoss`). With several
images per study, T is uniform over the row's positives (Khosla et al. 2020, arXiv 2004.11362, L_out). False negatives are
corrected by soft T, or by excluding pairs from the denominator (`ctx_distill.losses.false_negatives`).

The functions expect the global batch: gather features first (`ctx_distill.distributed.gather_with_gradient`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ctx_distill.losses.chunked import Rows, chunked_cross_entropy


@dataclass(frozen=True)
class _Direction:
    """One direction of the loss: rows of `queries` against all `keys`."""

    queries: Tensor
    keys: Tensor
    targets: Rows
    keep: Rows


def working_precision(x: Tensor) -> Tensor:
    """Convert half types to float32, so that logits at a scale of 100 stay precise; return others unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def study_targets(study: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return row-normalised targets where all items of one study are positives of each other.

    Args:
        study: (B,) int64 study codes.
        dtype: Type of the result.

    Returns:
        (B, B), rows sum to 1.
    """
    same = (study[:, None] == study[None, :]).to(dtype)
    return same / same.sum(dim=1, keepdim=True)


def _block(queries: Tensor, keys: Tensor, scale: Tensor, targets: Tensor | None, keep: Tensor | None) -> Tensor:
    """Return the sum of the rows' cross-entropies."""
    logits = scale * queries @ keys.T
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    log_p = F.log_softmax(logits, dim=1)
    if targets is None:
        return -log_p.diagonal().sum()
    if keep is not None:  # 0 * -inf would be NaN
        log_p = log_p.masked_fill(~keep, 0.0)
    return -(targets.to(log_p.dtype) * log_p).sum()


def _cross_entropy(direction: _Direction, scale: Tensor, chunk: int | None) -> Tensor:
    """Return the mean over rows, computed in chunks."""
    queries, keys, rows = direction.queries, direction.keys, len(direction.queries)
    if chunk is not None and chunk < rows:
        return chunked_cross_entropy(queries, keys, scale, direction.targets, direction.keep, chunk)
    return _block(queries, keys, scale, direction.targets(0, rows), direction.keep(0, rows)) / rows


def _same_study(study: Tensor, dtype: torch.dtype) -> Rows:
    def rows(start: int, stop: int) -> Tensor:
        same = (study[start:stop, None] == study[None, :]).to(dtype)
        return same.div_(same.sum(dim=1, keepdim=True))

    return rows


def _matrix(matrix: Tensor | None) -> Rows:
    return lambda start, stop: None if matrix is None else matrix[start:stop]


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    targets: Tensor | None = None,
    study: Tensor | None = None,
    text_targets: Tensor | None = None,
    denominator: Tensor | None = None,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Return InfoNCE over the global batch, in both directions.

    Args:
        image_features: (B, D), unit rows.
        text_features: (B, D), unit rows; row i belongs to image i.
        logit_scale: (), 1 / temperature (already exponentiated).
        targets: (B, B) non-negative, image i to text j, rows sum to 1. Default: from `study`, else the identity.
        study: (B,) int64 study codes; items of one study are positives of each other. Ignored if `targets` is set.
        text_targets: (B, B), text i to image j, rows sum to 1. Default: `targets` transposed, rows renormalised.
        denominator: (B, B) bool, image i to text j; False excludes the pair from both denominators. Pairs with a target
            above 0 must be included.
        chunk: Rows of logits computed at once: memory O(B x chunk) instead of O(B x B), apart from matrices passed in.
            None computes all rows.

    Returns:
        `image_to_text`, `text_to_image`, and their mean `total`, each ().

    Raises:
        ValueError: Shapes do not match.
    """
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            f"contrastive_loss got image features {tuple(image_features.shape)} and text features "
            f"{tuple(text_features.shape)}; expected the same shape (B, D)"
        )
    rows = len(image_features)
    for name, matrix in (("targets", targets), ("text_targets", text_targets), ("denominator", denominator)):
        if matrix is not None and matrix.shape != (rows, rows):
            raise ValueError(f"contrastive_loss got {name} {tuple(matrix.shape)}; expected {(rows, rows)}")
    with torch.autocast(image_features.device.type, enabled=False):
        image = working_precision(image_features)
        text = working_precision(text_features).to(image.dtype)  # a frozen tower may have another type
        scale = torch.as_tensor(logit_scale, device=image.device).to(image.dtype)
        if targets is not None:
            to_text = _matrix(targets)
            if text_targets is None:
                text_targets = targets.T / targets.T.sum(dim=1, keepdim=True)
            to_image = _matrix(text_targets)
        elif study is not None:
            to_text = to_image = _same_study(study, image.dtype)
        else:
            to_text = to_image = _matrix(None)
        keep, text_keep = _matrix(denominator), _matrix(None if denominator is None else denominator.T)
        image_to_text = _cross_entropy(_Direction(image, text, to_text, keep), scale, chunk)
        text_to_image = _cross_entropy(_Direction(text, image, to_image, text_keep), scale, chunk)
    return {
        "image_to_text": image_to_text,
        "text_to_image": text_to_image,
        "total": (image_to_text + text_to_image) / 2,
    }
