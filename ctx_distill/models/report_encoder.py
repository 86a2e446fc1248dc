"""Embed reports for keys and queries of the X-ray index, with the expert or a separate frozen encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctx_distill.errors import InputError
from ctx_distill.files import hash_json
from ctx_distill.models.opening import open_expert
from ctx_distill.models.text_encoder import BertTextEncoder, ExpertTextEncoder, TextEncoder
from ctx_distill.models.weights import hash_weights, read_provenance, resolve_source


class ReportEncoder(Protocol):
    """A frozen report encoder, such as an `XrayExpert` with a text tower."""

    @property
    def name(self) -> str:
        """The name of the folder or repository."""
        ...

    @property
    def text_dim(self) -> int | None:
        """D_t, the width of the embedding, or None without a text tower."""
        ...

    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Return L2-normalised embeddings (B, D_t) of texts of any length."""
        ...

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) that is independent of location."""
        ...

    def to(self, device: torch.device) -> Any:
        """Move the encoder to a device and return it."""
        ...


class FrozenReportEncoder(nn.Module):
    """A text encoder of `models/text_encoder.py`, frozen, as a `ReportEncoder`.

    Attributes:
        name: the folder's or repository's name.
        text_dim: D_t.
    """

    def __init__(self, encoder: TextEncoder, name: str, fingerprint: str) -> None:
        """Freeze an encoder.

        Args:
            encoder: text encoder; texts longer than its context are embedded in chunks of sentences.
            name: the folder's or repository's name.
            fingerprint: fingerprint of configuration, weights and tokenizer.
        """
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.name, self._fingerprint = name, fingerprint
        self.text_dim: int | None = encoder.embed_dim

    def train(self, mode: bool = True) -> FrozenReportEncoder:
        """Stay in eval mode regardless of `mode`."""
        del mode
        super().train(False)
        return self

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Return L2-normalised embeddings (B, D_t); longer texts are split by sentences and averaged."""
        if not texts:
            return torch.zeros(0, self.encoder.embed_dim, device=next(self.encoder.parameters()).device)
        parts = [self.encoder(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
        return F.normalize(torch.cat(parts).float(), dim=-1)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) over configuration, weights and tokenizer, independent of location."""
        return self._fingerprint


def open_report_encoder(source: str, revision: str | None = None) -> FrozenReportEncoder:
    """Open a frozen report encoder.

    Args:
        source: a folder, or `hf-hub:organisation/name`. For an X-ray expert, its text tower is used; anything else
            is opened as a BERT-like encoder of transformers (mean of its token states).
        revision: full commit hash; required for the hub.

    Raises:
        InputError: the source is not available, is an expert without a text tower, or is not a text encoder.
    """
    from ctx_distill.models.experts.transformers_expert import IMAGE_ONLY, TWO_TOWERS

    folder = resolve_source(source, revision)
    name = read_provenance(folder).name
    is_expert = (folder / "open_clip_config.json").is_file() or (folder / "xrv_config.json").is_file()
    if is_expert or _model_type(folder) in (*TWO_TOWERS, *IMAGE_ONLY):
        expert = open_expert(source, revision)
        if expert.text_tower is None:
            raise InputError(
                f"{source}: the report encoder given is {expert.name} ({expert.kind}), which has no text tower."
                " Expected an expert with one (open_clip, CLIP, SigLIP) or a BERT-like folder."
            )
        return FrozenReportEncoder(ExpertTextEncoder(expert.text_tower, False), name, expert.fingerprint())
    encoder = BertTextEncoder.from_pretrained(source, revision, trainable=False)
    weights = hash_weights(sorted(folder.glob("*.safetensors")))
    return FrozenReportEncoder(encoder, name, hash_json({"config": encoder.config(), "weights": weights}))


def _model_type(folder: Path) -> str | None:
    try:
        kind: str | None = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None  # `BertTextEncoder.from_pretrained` reports the problem
    return kind
