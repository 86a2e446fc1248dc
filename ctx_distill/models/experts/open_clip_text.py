"""open_clip's text towers and tokenizers, apart from the model that they came with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ctx_distill.models.text_tower import TextTower, write_tower_config
from ctx_distill.types import InputError

CONFIG_FILE = "open_clip_config.json"


class OpenClipTextTower(TextTower):
    """open_clip's own text transformer, or its wrapper of a Hugging Face encoder."""

    def __init__(self, module: nn.Module, embed_dim: int, text_cfg: dict[str, Any], quick_gelu: bool, tokenizer: Any):
        """Take over a built tower.

        Args:
            module: `open_clip.transformer.TextTransformer` or `open_clip.hf_model.HFTextEncoder`.
            embed_dim: D_t.
            text_cfg: open_clip's configuration of it.
            quick_gelu: as in the model's configuration.
            tokenizer: a Hugging Face tokenizer, or open_clip's `SimpleTokenizer`.
        """
        super().__init__()
        self.module: Any = module
        inner: Any = module
        self._text_cfg = dict(text_cfg)
        self._quick_gelu = quick_gelu
        self.tokenizer = tokenizer
        self.output_dim = embed_dim
        self._hugging_face = hasattr(module, "config")
        self.context_length = int(text_cfg.get("context_length", 77))
        self.vocab_size = int(inner.vocab_size)
        if self._hugging_face:
            self.hidden_dim = int(inner.config.hidden_size)
            self.pad_id = int(inner.config.pad_token_id)
            self.bidirectional = not getattr(inner.config, "is_decoder", False)
        else:
            self.hidden_dim = int(inner.width)
            self.pad_id = int(inner.pad_id)
            self.bidirectional = inner.attn_mask is None
        self.mask_id = getattr(tokenizer, "mask_token_id", None)

    @classmethod
    def build(cls, config: dict[str, Any], folder: Path) -> OpenClipTextTower:
        """A tower with random weights from what `save_files` wrote."""
        from open_clip.model import _build_text_tower

        text_cfg = dict(config["text_cfg"])
        if text_cfg.get("hf_model_name"):
            text_cfg["hf_model_name"] = str(folder / "text")
        module = _build_text_tower(config["embed_dim"], text_cfg, config["quick_gelu"])
        tokenizer = open_tokenizer(folder, text_cfg)
        return cls(module, config["embed_dim"], config["text_cfg"], config["quick_gelu"], tokenizer)

    def save_files(self, folder: Path) -> None:
        """Write configuration and tokenizer."""
        text_cfg = {**self._text_cfg, "hf_model_pretrained": False}
        if self._hugging_face:
            text_cfg["hf_model_name"] = "text"
            self.module.config.save_pretrained(folder / "text")
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)
            text_cfg["hf_tokenizer_name"] = "."
        write_tower_config(
            folder,
            {"kind": "open_clip", "embed_dim": self.output_dim, "text_cfg": text_cfg, "quick_gelu": self._quick_gelu},
        )

    def count(self, text: str) -> int:
        """Number of tokens of a text, marks included, without truncation."""
        if hasattr(self.tokenizer, "encode") and not hasattr(self.tokenizer, "backend_tokenizer"):
            return len(self.tokenizer.encode(text)) + 2
        return super().count(text)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, L), cut at the context length; L is the context length except where padding is masked out."""
        if hasattr(self.tokenizer, "backend_tokenizer"):
            out = self.tokenizer(
                [" ".join(text.split()) for text in texts], max_length=self.context_length, truncation=True,
                padding="longest" if self._hugging_face else "max_length", return_tensors="pt",
            )  # fmt: skip
            ids: Tensor = out["input_ids"]
        else:
            ids = self.tokenizer(list(texts), context_length=self.context_length)
        return ids.to(self.device)

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Token states (B, L, W) of token ids (B, L)."""
        if self._hugging_face:
            mask = (input_ids != self.pad_id).long()
            states: Tensor = self.module.transformer(input_ids=input_ids, attention_mask=mask).last_hidden_state
            return states
        length = input_ids.shape[1]  # learned positions, and the class token after the last of them: pad to the full
        if length < self.context_length:
            input_ids = nn.functional.pad(input_ids, (0, self.context_length - length), value=self.pad_id)
        before = self.module.output_tokens
        self.module.output_tokens = True
        try:
            _, states = self.module(input_ids)
        finally:
            self.module.output_tokens = before
        return states[:, :length]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings (B, D_t), not normalised, of token ids (B, L)."""
        features: Tensor = self.module(input_ids)
        return features


def open_tokenizer(folder: Path, text_cfg: dict[str, Any]) -> Any:
    """The tokenizer of an open_clip folder, as open_clip itself would choose it.

    Raises:
        InputError: none of the places that it may come from has it.
    """
    name = text_cfg.get("hf_tokenizer_name")
    files = (folder / "tokenizer.json").is_file() or (folder / "vocab.txt").is_file()
    if not name and not files:
        from open_clip.tokenizer import SimpleTokenizer

        return SimpleTokenizer(context_length=int(text_cfg.get("context_length", 77)))
    from transformers import AutoTokenizer

    mode = text_cfg.get("tokenizer_mode")
    if mode:
        raise InputError(f"{folder / CONFIG_FILE}: tokenizer_mode {mode!r} is not supported; expected none.")
    places = [folder, *((folder / name, folder / name.split("/")[-1]) if name else ())]
    place = next((p for p in places if (p / "tokenizer.json").is_file() or (p / "vocab.txt").is_file()), None)
    try:
        return AutoTokenizer.from_pretrained(str(place) if place else name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: no tokenizer. Looked for tokenizer.json or vocab.txt here and in {name!r}, and in the cache of"
            f" huggingface_hub ({str(error).splitlines()[0]}). Place tokenizer.json and tokenizer_config.json in the"
            " folder, or fetch the repository with `ctx-distill weights fetch`."
        ) from error
