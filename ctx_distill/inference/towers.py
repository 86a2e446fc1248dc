"""The towers as plain modules of tensors, for torch.export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctx_distill.inference.parts import Parts
from ctx_distill.models.dual_encoder import DualEncoder
from ctx_distill.models.text_encoder import ExpertTextEncoder


class ImageTower(nn.Module):
    """Prepared volumes (B, 1, D, H, W) to a dict: `pooled` (B, D_c), with a dual encoder `embedding` (B, D), unit rows,
    without the prior, and with a classifier `logits` (B, F)."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        classifier = parts.classifier
        self.dual_encoder = None if parts.dual is None else parts.dual.ct_encoder
        self.projection = None if parts.dual is None else parts.dual.image_projection
        self.own_encoder = None if classifier is None else classifier.encoder
        self.head = None if classifier is None else classifier.head

    def forward(self, volume: Tensor) -> dict[str, Tensor]:
        """See the class."""
        found: dict[str, Tensor] = {}
        if self.dual_encoder is not None and self.projection is not None:
            found["pooled"] = self.dual_encoder.forward(volume).pooled
            found["embedding"] = F.normalize(self.projection(found["pooled"]), dim=-1)
        pooled = found["pooled"] if self.own_encoder is None else self.own_encoder.forward(volume).pooled
        found.setdefault("pooled", pooled)
        if self.head is not None:
            found["logits"] = self.head(pooled)
        return found


class TextTower(nn.Module):
    """Token ids and mask (B, L), L the context length, of texts that fit it, to unit rows (B, D)."""

    def __init__(self, dual: DualEncoder) -> None:
        super().__init__()
        self.encoder, self.projection = dual.text_encoder, dual.text_projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See the class."""
        if isinstance(self.encoder, ExpertTextEncoder):
            features = F.normalize(self.encoder.tower.forward(input_ids).float(), dim=-1)
        else:
            mask = attention_mask[..., None].float()
            features = (self.encoder.hidden(input_ids, attention_mask) * mask).sum(1) / mask.sum(1)
        return F.normalize(self.projection(features), dim=-1)

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask of texts, padded to the context length; of a long text its beginning."""
        encoder = self.encoder
        if isinstance(encoder, ExpertTextEncoder):
            ids = encoder.tower.tokenize(texts)
            mask = torch.ones_like(ids)
            pad = encoder.tower.pad_id
        else:
            found = encoder.tokens(texts)
            ids, mask = found.input_ids, found.attention_mask.long()
            tokenizer: Any = encoder.tokenizer
            pad = int(tokenizer.pad_token_id or 0)
        missing = encoder.context_length - ids.shape[1]
        return F.pad(ids, (0, missing), value=pad), F.pad(mask, (0, missing))


def export_module(module: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Write a module as a torch.export program (.pt2) whose batch may have any size.

    Args:
        module: in eval mode; takes tensors whose first dimension is the batch.
        inputs: an example of two or more rows.
        path: to write.
    """
    shapes = tuple({0: torch.export.Dim("batch", min=1, max=4096)} for _ in inputs)
    with torch.no_grad():
        program = torch.export.export(module.eval(), inputs, dynamic_shapes=shapes)
    torch.export.save(program, path)
