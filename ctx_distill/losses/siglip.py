"""The pairwise sigmoid loss between images and reports (SigLIP, Zhai et al. 2023, arXiv 2303.15343), a baseline.

    L = -1/B sum_ij log sigmoid( z_ij (s <h_i, t_j> + b) ),   z_ij = 1 for a positive pair, else -1

With one positive per row, this is `open_clip.loss.SigLipLoss`. Pairs of one study are also positives (**ours**: the paper
has one image per text). The function expects the global batch: gather features first (`ctx_distill.distributed`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ctx_distill.losses.contrastive import working_precision

INIT_LOGIT_SCALE = 10.0
"""Initial s (section 3.2 of the SigLIP paper)."""
INIT_LOGIT_BIAS = -10.0
"""Initial b; nearly all pairs are negatives, which the model should not have to learn in its first steps."""


def _block(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, image_study: Tensor, study: Tensor) -> Tensor:
    """Return the sum over the pairs of some images with all texts."""
    sign = torch.where(image_study[:, None] == study[None, :], 1.0, -1.0).to(images.dtype)
    return -F.logsigmoid(sign * (scale * images @ texts.T + bias)).sum()


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    study: Tensor | None = None,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Return the sigmoid loss over all pairs of the global batch.

    Args:
        image_features: (B, D), unit rows.
        text_features: (B, D), unit rows; row i belongs to image i.
        logit_scale: (), s, already exponentiated.
        logit_bias: (), b.
        study: (B,) int64 study codes; items of one study are positives of each other. Default: all differ.
        chunk: Rows of logits computed at once; None computes all.

    Returns:
        `total`, ().

    Raises:
        ValueError: Shapes do not match.
    """
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            f"siglip_loss got image features {tuple(image_features.shape)} and text features "
            f"{tuple(text_features.shape)}; expected the same shape (B, D)"
        )
    rows = len(image_features)
    step = chunk or rows
    with torch.autocast(image_features.device.type, enabled=False):
        image, text = working_precision(image_features), working_precision(text_features)
        scale, bias = (torch.as_tensor(x, device=image.device).to(image.dtype) for x in (logit_scale, logit_bias))
        study = torch.arange(rows, device=image.device) if study is None else study
        total = image.new_zeros(())
        for images, image_study in zip(torch.split(image, step), torch.split(study, step), strict=True):
            if step < rows and torch.is_grad_enabled():
                part = checkpoint(
                    _block, images, text, scale, bias, image_study, study, use_reentrant=False, preserve_rng_state=False
                )
            else:
                part = _block(images, text, scale, bias, image_study, study)
            total = total + part
    return {"total": total / rows}
