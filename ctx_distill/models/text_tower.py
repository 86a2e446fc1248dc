"""Text towers of X-ray experts: embed token ids, and long reports in chunks that fit the context."""

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
    """Tokenized texts.

    Attributes:
        input_ids: (B, L) int64, padded.
        attention_mask: (B, L) bool, false at padding.
        special_mask: (B, L) bool, true at padding and special tokens ([CLS], [SEP]).
        offsets: (B, L, 2) int64, first and one past the last character of each token; 0, 0 for special tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    special_mask: Tensor
    offsets: Tensor


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a SHA-256 of a tokenizer's behaviour, independent of its folder and of padding and truncation state."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = getattr(tokenizer, "encoder", None) or tokenizer.get_vocab()
        return hash_json({"class": type(tokenizer).__name__, "vocabulary": vocabulary})
    state = json.loads(backend.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    return hash_json({"state": state, "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()}})


def tokenize_with_offsets(tokenizer: Any, texts: Sequence[str], length: int, device: torch.device) -> TokenizedText:
    """Tokenize texts with character offsets, padded to the longest text and truncated to `length`."""
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
    """The text encoder of an expert with its tokenizer; the caller decides whether it is trainable.

    Attributes:
        output_dim: D_t, width of the embedding.
        hidden_dim: W, width of the token states.
        context_length: max length of a text in tokens, including special tokens.
        vocab_size: number of token ids.
        bidirectional: whether tokens attend to later tokens, as masked language modelling requires.
        pad_id: id of the padding token.
        mask_id: id of the mask token, or None.
        tokenizer: a tokenizer of Hugging Face or open_clip.
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
        """Return token ids (B, L), truncated to the context length and padded as in the tower's training."""

    @abstractmethod
    def hidden(self, input_ids: Tensor) -> Tensor:
        """Return token states (B, L, W) of token ids (B, L)."""

    @abstractmethod
    def forward(self, input_ids: Tensor) -> Tensor:
        """Return unnormalised embeddings (B, D_t) of token ids (B, L)."""

    @abstractmethod
    def save_files(self, folder: Path) -> None:
        """Write configuration and tokenizer for `load_text_tower`."""

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    def count(self, text: str) -> int:
        """Return the number of tokens of a text including special tokens, without truncation."""
        return len(self.tokenizer(text, truncation=False, padding=False)["input_ids"])

    def chunks(self, text: str) -> list[str]:
        """Split a report into few runs of sentences that fit the context; a text that fits is one chunk."""

        def fits(part: str) -> bool:
            return self.count(part) <= self.context_length

        return [text] if not text.strip() or fits(text) else pack_chunks(split_sentences(text), fits) or [text]

    def encode_reports(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Embed texts of any length as the mean of the normalised embeddings of their chunks.

        Args:
            texts: B texts; "" is embedded as the empty string.
            batch_size: number of chunks per batch.

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
    """Write a tower's configuration for `load_text_tower`."""
    write_json(folder / TOWER_FILE, config)
