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
    """Map prepared volumes (B, 1, D, H, W) to a dict: `pooled` (B, D_c); with a dual encoder `embedding` (B, D), unit rows;
    with a classifier `logits` (B, F).

    A model with a projection prior also takes the projections of the scans, (B, S, S) in [0, 1], from
    `square_projection`. They are finer than the prepared volume, so that they cannot be computed from it.

    Args:
        parts: the parts of the model.
        prior: include the projection prior, if the model has one, in `embedding`.
    """

    def __init__(self, parts: Parts, prior: bool = True) -> None:
        super().__init__()
        self.expert = parts.expert if prior else None
        self.dual = parts.dual if self.expert is not None else None  # knows how the prior is joined
        classifier = parts.classifier
        self.dual_encoder = None if parts.dual is None else parts.dual.ct_encoder
        self.projection = None if parts.dual is None else parts.dual.image_projection
        self.own_encoder = None if classifier is None else classifier.encoder
        self.head = None if classifier is None else classifier.head

    def forward(self, volume: Tensor, projection: Tensor | None = None) -> dict[str, Tensor]:
        """See the class."""
        found: dict[str, Tensor] = {}
        if self.dual_encoder is not None and self.projection is not None:
            found["pooled"] = self.dual_encoder.forward(volume).pooled
            found["embedding"] = F.normalize(self.projection(found["pooled"]), dim=-1)
            if self.expert is not None and self.dual is not None and projection is not None:
                seen = self.expert.encode_image(self.expert.preprocess_batch(projection))
                found["embedding"] = self.dual.join_prior(found["embedding"], F.normalize(seen, dim=-1))
        pooled = found["pooled"] if self.own_encoder is None else self.own_encoder.forward(volume).pooled
        found.setdefault("pooled", pooled)
        if self.head is not None:
            found["logits"] = self.head(pooled)
        return found


class ReportTower(nn.Module):
    """Map chunks of reports to unit rows (B, D): token ids and mask (C, L), L the context length, and the share (B, C) of each
    chunk in each report, with rows that sum to 1."""

    def __init__(self, dual: DualEncoder) -> None:
        super().__init__()
        self.encoder, self.projection = dual.text_encoder, dual.text_projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor, share: Tensor) -> Tensor:
        """See the class."""
        if isinstance(self.encoder, ExpertTextEncoder):
            features = F.normalize(self.encoder.tower.forward(input_ids).float(), dim=-1)
        else:
            mask = attention_mask[..., None].float()
            features = (self.encoder.hidden(input_ids, attention_mask) * mask).sum(1) / mask.sum(1)
        return F.normalize(self.projection(share @ features), dim=-1)

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return token ids and mask of the chunks of texts, padded to the context length, and their shares."""
        encoder = self.encoder
        groups = [encoder.chunks(text) for text in texts]
        share = torch.zeros(len(groups), sum(map(len, groups)))
        for row, group in enumerate(groups):
            start = sum(map(len, groups[:row]))
            share[row, start : start + len(group)] = 1 / len(group)
        texts = [part for group in groups for part in group]
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
        return F.pad(ids, (0, missing), value=pad), F.pad(mask, (0, missing)), share


def export_module(module: nn.Module, inputs: tuple[Tensor, ...], path: Path, free: Sequence[Sequence[str]]) -> None:
    """Write a module as a torch.export program (.pt2) for any batch size.

    Args:
        module: in eval mode.
        inputs: example inputs of two or more rows.
        path: file to write.
        free: for each input, the names of its first dimensions, which may have any size; equal names mean equal sizes.
    """
    sizes = {name: torch.export.Dim(name, min=1, max=4096) for names in free for name in names}
    shapes = tuple({place: sizes[name] for place, name in enumerate(names)} for names in free)
    with torch.no_grad():
        program = torch.export.export(module.eval(), inputs, dynamic_shapes=shapes)
    torch.export.save(program, path)
