"""What embeds reports for the keys and the queries of the X-ray index: the expert, or a frozen encoder of its own."""

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
    """A frozen encoder of reports; every `XrayExpert` with a text tower is one."""

    @property
    def name(self) -> str:
        """The folder's or repository's name."""
        ...

    @property
    def text_dim(self) -> int | None:
        """D_t, width of the embedding; None where there is no text tower."""
        ...

    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """(B, D_t), L2-normalised, of texts of any length."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hex); equal wherever the files lie."""
        ...

    def to(self, device: torch.device) -> Any:
        """Itself, moved to a device."""
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
            encoder: what embeds; a text longer than its context goes through it in chunks of sentences.
            name: the folder's or repository's name.
            fingerprint: of configuration, weights and tokenizer.
        """
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.name, self._fingerprint = name, fingerprint
        self.text_dim: int | None = encoder.embed_dim

    def train(self, mode: bool = True) -> FrozenReportEncoder:
        """Stay in eval mode, whatever is asked."""
        del mode
        super().train(False)
        return self

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """(B, D_t), L2-normalised. A text longer than the context is split between sentences and averaged."""
        if not texts:
            return torch.zeros(0, self.encoder.embed_dim, device=next(self.encoder.parameters()).device)
        parts = [self.encoder(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
        return F.normalize(torch.cat(parts).float(), dim=-1)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over configuration, weights and tokenizer; equal wherever the files lie."""
        return self._fingerprint


def open_report_encoder(source: str, revision: str | None = None) -> FrozenReportEncoder:
    """Open a frozen encoder of reports.

    Args:
        source: a folder, or `hf-hub:organisation/name`. An X-ray expert with a text tower gives that tower; anything
            else is opened as a BERT-like encoder of transformers (mean of its token states).
        revision: full commit hash; needed for the hub.

    Raises:
        InputError: it cannot be had, is an expert without a text tower, or no text encoder.
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
        return None  # `BertTextEncoder.from_pretrained` says what is wrong
    return kind
