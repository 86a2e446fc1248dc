"""Text towers of X-ray experts: token ids to an embedding, and long reports in chunks that fit the context."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctx_distill.files import hash_json, write_json
from ctx_distill.text.report_text import pack_chunks, split_sentences

TOWER_FILE = "text_tower.json"


@dataclass
class TokenizedText:
    """Texts as tokens.

    Attributes:
        input_ids: (B, L) int64, padded.
        attention_mask: (B, L) bool, true at tokens that are not padding.
        special_mask: (B, L) bool, true at padding and at the tokenizer's own marks ([CLS], [SEP]).
        offsets: (B, L, 2) int64, first and one past the last character of each token in its text; 0, 0 at marks.
    """

    input_ids: Tensor
    attention_mask: Tensor
    special_mask: Tensor
    offsets: Tensor


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does, whatever folder it came from (padding and truncation state left out)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = getattr(tokenizer, "encoder", None) or tokenizer.get_vocab()
        return hash_json({"class": type(tokenizer).__name__, "vocabulary": vocabulary})
    state = json.loads(backend.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    return hash_json({"state": state, "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()}})


def tokenize_with_offsets(tokenizer: Any, texts: Sequence[str], length: int, device: torch.device) -> TokenizedText:
    """Tokens with their places in the texts, padded to the longest text and cut at `length`."""
    out = tokenizer(
        list(texts), max_length=length, padding="longest", truncation=True, return_tensors="pt",
        return_attention_mask=True, return_offsets_mapping=True, return_special_tokens_mask=True,
    )  # fmt: skip
    return TokenizedText(
        out["input_ids"].to(device),
        out["attention_mask"].bool().to(device),
        out["special_tokens_mask"].bool().to(device),
        out["offset_mapping"].to(device),
    )


class TextTower(nn.Module, ABC):
    """A text encoder with its tokenizer, cut out of an expert; trainable or frozen is the owner's choice.

    Attributes:
        output_dim: D_t, width of the embedding.
        hidden_dim: W, width of the token states.
        context_length: longest text in tokens, marks included.
        vocab_size: number of token ids.
        bidirectional: whether a token sees the tokens after it (what masked language modelling needs).
        pad_id: id of the padding token.
        mask_id: id of the mask token; None where the vocabulary has none.
        tokenizer: a Hugging Face tokenizer, or open_clip's own.
    """

    output_dim: int
    hidden_dim: int
    context_length: int
    vocab_size: int
    bidirectional: bool
    pad_id: int
    mask_id: int | None
    tokenizer: Any

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, L), cut at the context length, padded as the tower was trained."""

    @abstractmethod
    def hidden(self, input_ids: Tensor) -> Tensor:
        """Token states (B, L, W) of token ids (B, L)."""

    @abstractmethod
    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings (B, D_t), not normalised, of token ids (B, L)."""

    @abstractmethod
    def save_files(self, folder: Path) -> None:
        """Write what `load_text_tower` needs besides the weights: configuration and tokenizer."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def count(self, text: str) -> int:
        """Number of tokens of a text, marks included, without truncation."""
        return len(self.tokenizer(text, truncation=False, padding=False)["input_ids"])

    def chunks(self, text: str) -> list[str]:
        """A report in as few runs of sentences as fit the context; a text that fits stays one chunk."""

        def fits(part: str) -> bool:
            return self.count(part) <= self.context_length

        return [text] if not text.strip() or fits(text) else pack_chunks(split_sentences(text), fits) or [text]

    def encode_reports(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Embed texts of any length: chunks that fit the context, each normalised, averaged over the text.

        Args:
            texts: B texts; "" is embedded as the empty string.
            batch_size: chunks that go through the tower at once.

        Returns:
            (B, D_t), not normalised.
        """
        if not texts:
            return torch.zeros(0, self.output_dim, device=self.device)
        parts = [self.chunks(text) for text in texts]
        flat = [part for group in parts for part in group]
        owner = torch.tensor([i for i, group in enumerate(parts) for _ in group], device=self.device)
        features = torch.cat(
            [
                F.normalize(self(self.tokenize(flat[start : start + batch_size])).float(), dim=-1)
                for start in range(0, len(flat), batch_size)
            ]
        )
        count = torch.tensor([len(group) for group in parts], device=self.device, dtype=features.dtype)
        pooled = features.new_zeros(len(texts), features.shape[1]).index_add(0, owner, features)
        return pooled / count[:, None]


def write_tower_config(folder: Path, config: dict[str, Any]) -> None:
    """Write a tower's configuration where `load_text_tower` reads it."""
    write_json(folder / TOWER_FILE, config)
