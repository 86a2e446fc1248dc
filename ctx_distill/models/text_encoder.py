"""Text encoders of the alignment stage: a BERT, or the text tower of the X-ray expert."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctx_distill.files import hash_json
from ctx_distill.models.opening import load_text_tower
from ctx_distill.models.text_tower import TextTower, TokenizedText, tokenize_with_offsets, tokenizer_hash
from ctx_distill.text.report_text import pack_chunks, split_sentences
from ctx_distill.types import InputError


class TextEncoder(nn.Module, ABC):
    """Reports to embeddings (B, D_t), with access to tokens for masked language modelling.

    Attributes:
        embed_dim: D_t.
        hidden_dim: W, width of the token states.
        context_length: longest run of tokens that `hidden` takes.
        vocab_size: number of token ids.
        bidirectional: whether a token sees those after it; masked language modelling needs it.
        mask_id: id of the mask token; None where there is none.
        trainable: whether its weights learn.
    """

    embed_dim: int
    hidden_dim: int
    context_length: int
    vocab_size: int
    bidirectional: bool
    mask_id: int | None
    trainable: bool

    @abstractmethod
    def forward(self, texts: Sequence[str]) -> Tensor:
        """(B, D_t), not normalised; longer texts than the context in chunks, "" as the empty string."""

    @abstractmethod
    def chunks(self, text: str) -> list[str]:
        """A report in as few runs of sentences as fit the context; a text that fits stays one chunk."""

    @abstractmethod
    def tokens(self, texts: Sequence[str]) -> TokenizedText:
        """Token ids with masks and character offsets, cut at the context length."""

    @abstractmethod
    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token states (B, L, W) of ids (B, L), masked or not."""

    @abstractmethod
    def save_files(self, folder: Path) -> None:
        """Write configuration and tokenizer; the weights are saved by the artefact."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """`class_name` and plain JSON values, for `load_text_encoder`; holds the tokenizer's hash."""


def _no_pooler(config: Any) -> dict[str, bool]:
    """The argument that leaves out BERT's pooling layer, for architectures that know it; it would get no gradient."""
    from transformers import AutoModel

    parameters = inspect.signature(AutoModel._model_mapping[type(config)].__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}


class BertTextEncoder(TextEncoder):
    """A Hugging Face BERT with the mean of its token states as embedding; long reports in chunks, averaged."""

    def __init__(self, model: nn.Module, tokenizer: Any, context_length: int, trainable: bool = True) -> None:
        """Take over a built model; `from_pretrained` and `from_scratch` are the ways to get one.

        Args:
            model: a bidirectional transformers encoder.
            tokenizer: its tokenizer.
            context_length: longest chunk in tokens.
            trainable: whether its weights learn.
        """
        super().__init__()
        config: Any = model.config
        self.model = model.requires_grad_(trainable)
        self.tokenizer = tokenizer
        self.trainable = trainable
        self.context_length = context_length
        self.embed_dim = self.hidden_dim = int(config.hidden_size)
        self.vocab_size = int(config.vocab_size)
        self.bidirectional = not getattr(config, "is_decoder", False)
        self.mask_id = tokenizer.mask_token_id

    @classmethod
    def from_pretrained(
        cls, source: str, revision: str | None = None, context_length: int = 256, trainable: bool = True
    ) -> BertTextEncoder:
        """Open a BERT-like encoder from a folder or, at a pinned commit, from the hub.

        Raises:
            InputError: it cannot be had, needs remote code, or has no safetensors.
        """
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        from ctx_distill.models.weights import refuse_remote_code, resolve_source

        folder = resolve_source(source, revision)
        refuse_remote_code(folder)
        try:
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
            model, info = AutoModel.from_pretrained(
                str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True,
                dtype=torch.float32, **_no_pooler(config),
            )  # fmt: skip
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{folder}: not a text encoder of transformers ({str(error)[:300]}). Looked for config.json,"
                " model.safetensors and tokenizer.json."
            ) from error
        if info["missing_keys"]:
            raise InputError(
                f"{folder}: its weights lack {len(info['missing_keys'])} tensors of {type(model).__name__}"
                f" ({', '.join(sorted(info['missing_keys'])[:3])}). Use the config.json that they were saved with."
            )
        longest = int(getattr(model.config, "max_position_embeddings", context_length))
        return cls(model, tokenizer, min(context_length, longest), trainable)

    @classmethod
    def from_scratch(
        cls,
        texts: Sequence[str],
        folder: Path,
        vocab_size: int = 2000,
        width: int = 128,
        layers: int = 2,
        context_length: int = 128,
        dropout: float = 0.0,
    ) -> BertTextEncoder:
        """A small BERT with random weights over a WordPiece vocabulary trained on reports.

        Args:
            texts: reports of the train split.
            folder: where the tokenizer is written.
            vocab_size: of the tokenizer.
            width: hidden size, a multiple of 32.
            layers: number of them.
            context_length: longest chunk in tokens.
            dropout: rate; 0 for cached gradients to equal the plain step's.
        """
        from transformers import BertConfig, BertModel

        from ctx_distill.text.tokenizer import train_wordpiece

        tokenizer = train_wordpiece(texts, vocab_size, folder, context_length)
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
            intermediate_size=4 * width, max_position_embeddings=context_length, hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return cls(BertModel(config, add_pooling_layer=False), tokenizer, context_length)

    def train(self, mode: bool = True) -> BertTextEncoder:
        """Frozen, it stays in eval mode."""
        super().train(mode and self.trainable)
        return self

    def tokens(self, texts: Sequence[str]) -> TokenizedText:
        """Token ids with masks and character offsets, cut at the context length."""
        return tokenize_with_offsets(self.tokenizer, texts, self.context_length, next(self.parameters()).device)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token states (B, L, W)."""
        states: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask.long()).last_hidden_state
        return states

    def chunks(self, text: str) -> list[str]:
        """A report in as few runs of sentences as fit the context; a text that fits stays one chunk."""

        def fits(part: str) -> bool:
            return len(self.tokenizer(part, truncation=False, padding=False)["input_ids"]) <= self.context_length

        return [text] if not text.strip() or fits(text) else pack_chunks(split_sentences(text), fits) or [text]

    def forward(self, texts: Sequence[str]) -> Tensor:
        """(B, D_t): the mean over the tokens of each chunk, and over the chunks of a report."""
        parts = [self.chunks(text) for text in texts]
        flat = self.tokens([part for group in parts for part in group])
        mask = flat.attention_mask[..., None].float()
        means = (self.hidden(flat.input_ids, flat.attention_mask) * mask).sum(1) / mask.sum(1)
        device = means.device
        owner = torch.tensor([i for i, group in enumerate(parts) for _ in group], device=device)
        count = torch.tensor([len(group) for group in parts], device=device, dtype=means.dtype)
        return means.new_zeros(len(texts), self.embed_dim).index_add(0, owner, means) / count[:, None]

    def save_files(self, folder: Path) -> None:
        """Write `config.json` and the tokenizer."""
        config: Any = self.model.config
        config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def config(self) -> dict[str, Any]:
        """Plain JSON values for `load_text_encoder`."""
        model_config: Any = self.model.config
        values = model_config.to_dict()
        return {
            "class_name": "BertTextEncoder",
            "context_length": self.context_length,
            "trainable": self.trainable,
            "model": hash_json({k: v for k, v in values.items() if k not in ("_name_or_path", "transformers_version")}),
            "tokenizer": tokenizer_hash(self.tokenizer),
        }


class ExpertTextEncoder(TextEncoder):
    """The X-ray expert's text tower, frozen or learning on; reports are chunked by the expert's own rule."""

    def __init__(self, tower: TextTower, trainable: bool) -> None:
        """Take over a tower; `from_expert` copies one out of an expert.

        Args:
            tower: an expert's text tower.
            trainable: whether its weights learn.
        """
        super().__init__()
        self.tower = tower.requires_grad_(trainable)
        self.trainable = trainable
        self.embed_dim = tower.output_dim
        self.hidden_dim = tower.hidden_dim
        self.context_length = tower.context_length
        self.vocab_size = tower.vocab_size
        self.bidirectional = tower.bidirectional
        self.mask_id = tower.mask_id

    @classmethod
    def from_expert(cls, source: str, revision: str | None = None, trainable: bool = False) -> ExpertTextEncoder:
        """Open an expert and copy its text tower.

        Raises:
            InputError: the expert cannot be had or has no text tower.
        """
        from ctx_distill.models.opening import open_expert

        expert = open_expert(source, revision)
        if expert.text_tower is None:
            raise InputError(
                f"{source}: the X-ray expert {expert.name} has no text tower. Use BertTextEncoder for the reports."
            )
        return cls(copy.deepcopy(expert.text_tower), trainable)

    def train(self, mode: bool = True) -> ExpertTextEncoder:
        """Frozen, it stays in eval mode."""
        super().train(mode and self.trainable)
        return self

    def chunks(self, text: str) -> list[str]:
        """A report in chunks, by the expert's own rule."""
        return self.tower.chunks(text)

    def tokens(self, texts: Sequence[str]) -> TokenizedText:
        """Token ids with masks and character offsets, cut at the context length."""
        if not hasattr(self.tower.tokenizer, "backend_tokenizer"):
            raise InputError(
                "the expert's tokenizer (open_clip's byte pairs) gives no places of its tokens, so entities cannot be"
                " masked. Choose an expert with a Hugging Face tokenizer, or BertTextEncoder."
            )
        return tokenize_with_offsets(self.tower.tokenizer, texts, self.context_length, self.tower.device)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token states (B, L, W); the tower tells padding by its id."""
        del attention_mask
        return self.tower.hidden(input_ids)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """(B, D_t), the mean of the normalised chunk embeddings."""
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            return self.tower.encode_reports(texts)

    def save_files(self, folder: Path) -> None:
        """Write the tower's configuration and tokenizer."""
        self.tower.save_files(folder)

    def config(self) -> dict[str, Any]:
        """Plain JSON values for `load_text_encoder`."""
        return {
            "class_name": "ExpertTextEncoder",
            "trainable": self.trainable,
            "tokenizer": tokenizer_hash(self.tower.tokenizer),
        }


def load_text_encoder(config: dict[str, Any], folder: Path) -> TextEncoder:
    """Build an encoder with random weights from `TextEncoder.config()` and the files of `save_files`.

    Raises:
        InputError: the class is not known, or a file is missing.
    """
    if config.get("class_name") == "ExpertTextEncoder":
        return ExpertTextEncoder(load_text_tower(folder), bool(config["trainable"]))
    if config.get("class_name") != "BertTextEncoder":
        raise InputError(
            f"{folder}: text encoder {config.get('class_name')!r}, expected BertTextEncoder or ExpertTextEncoder."
        )
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    try:
        model_config = AutoConfig.from_pretrained(str(folder))
        model = AutoModel.from_config(model_config, **_no_pooler(model_config))
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: no text encoder ({str(error)[:200]}). Run the stage that makes it again."
        ) from error
    return BertTextEncoder(model, tokenizer, int(config["context_length"]), bool(config["trainable"]))
