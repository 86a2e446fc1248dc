"""Reports written from CT tokens: a causal language model with cross-attention to them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctx_distill.checkpoint import Artefact, load_weights, read_artefact, write_artefact
from ctx_distill.files import hash_json
from ctx_distill.models.text_tower import tokenizer_hash
from ctx_distill.types import InputError

DECODER_FOLDER = "decoder"


class ReportDecoder(nn.Module):
    """A Hugging Face causal decoder that attends to CT tokens (B, T, D_c) through a projection.

    Attributes:
        token_dim: D_c.
        num_tokens: T, where the tokens' places are learnt; None for tokens without places.
        max_length: longest report in tokens, marks included.
    """

    def __init__(
        self, decoder: nn.Module, tokenizer: Any, token_dim: int, num_tokens: int | None = None, max_length: int = 256
    ) -> None:
        """Take over a built decoder; `from_scratch` and `from_pretrained` are the ways to get one.

        Args:
            decoder: a transformers model with a language-model head and cross-attention.
            tokenizer: its tokenizer, with pad, and cls and sep (or bos and eos) tokens.
            token_dim: D_c.
            num_tokens: T; without it a token carries its place only as far as the CT encoder put it there.
            max_length: longest report in tokens.

        Raises:
            InputError: the decoder has no cross-attention, or the tokenizer lacks a mark.
        """
        super().__init__()
        if not any("crossattention" in name.lower() or "encoder_attn" in name for name, _ in decoder.named_modules()):
            raise InputError(
                f"report decoder: {type(decoder).__name__} has no cross-attention. Expected a causal model whose"
                " configuration knows add_cross_attention (GPT-2, BERT, RoBERTa)."
            )
        self._start = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
        self._end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self._end
        if self._start is None or self._end is None:
            raise InputError("report decoder: its tokenizer has no [CLS]/[SEP] and no bos/eos tokens; expected a pair.")
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.token_dim = token_dim
        self.num_tokens = num_tokens
        config: Any = decoder.config
        self.max_length = min(max_length, int(getattr(config, "max_position_embeddings", max_length)))
        hidden = int(config.hidden_size)
        self.projection = nn.Sequential(nn.LayerNorm(token_dim), nn.Linear(token_dim, hidden))
        self.places = nn.Parameter(torch.randn(num_tokens, hidden) * 0.02) if num_tokens else None

    @classmethod
    def from_scratch(
        cls,
        texts: Sequence[str],
        folder: Path,
        token_dim: int,
        num_tokens: int | None = None,
        vocab_size: int = 2000,
        width: int = 128,
        layers: int = 2,
        max_length: int = 128,
        dropout: float = 0.1,
    ) -> ReportDecoder:
        """A small GPT-2 with random weights over a WordPiece vocabulary trained on reports.

        Args:
            texts: reports of the train split.
            folder: where the tokenizer is written.
            token_dim: D_c.
            num_tokens: T.
            vocab_size: of the tokenizer.
            width: hidden size, a multiple of 32.
            layers: number of them.
            max_length: longest report in tokens.
            dropout: rate.
        """
        from transformers import GPT2Config, GPT2LMHeadModel

        from ctx_distill.text.tokenizer import train_wordpiece

        tokenizer = train_wordpiece(texts, vocab_size, folder, max_length)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=max_length, n_embd=width, n_layer=layers, n_head=width // 32,
            add_cross_attention=True, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
            bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return cls(GPT2LMHeadModel(config), tokenizer, token_dim, num_tokens, max_length)

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        token_dim: int,
        num_tokens: int | None = None,
        revision: str | None = None,
        max_length: int = 256,
    ) -> ReportDecoder:
        """Open a language model from a folder or a pinned hub repository; its cross-attention starts at random.

        Raises:
            InputError: it cannot be had, needs remote code, or cannot attend to tokens.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        from ctx_distill.models.weights import resolve_source
        from ctx_distill.models.xray_expert import refuse_remote_code

        folder = resolve_source(source, revision)
        refuse_remote_code(folder)
        try:
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
            config.add_cross_attention, config.is_decoder = True, True
            model, info = AutoModelForCausalLM.from_pretrained(
                str(folder), config=config, use_safetensors=True, local_files_only=True, output_loading_info=True,
                dtype=torch.float32,
            )  # fmt: skip
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{folder}: not a causal language model with cross-attention ({str(error)[:300]}). Looked for"
                " config.json, model.safetensors and tokenizer.json."
            ) from error
        missing = sorted(key for key in info["missing_keys"] if not re.search(r"cross_?att", key))
        if missing:
            raise InputError(
                f"{folder}: its weights lack {len(missing)} tensors of {type(model).__name__} ({', '.join(missing[:3])})."
                " Use the config.json that they were saved with."
            )
        return cls(model, tokenizer, token_dim, num_tokens, max_length)

    def tokenize(self, reports: Sequence[str]) -> dict[str, Tensor]:
        """Reports as input_ids, attention_mask and labels (B, L): start, words, end; padding is -100 in the labels."""
        device = next(self.parameters()).device
        rows = [
            [
                self._start,
                *self.tokenizer(text, add_special_tokens=False)["input_ids"][: self.max_length - 2],
                self._end,
            ]
            for text in reports
        ]
        length = max(len(row) for row in rows)
        ids = torch.tensor([row + [self._pad] * (length - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def _memory(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 3 or tokens.shape[2] != self.token_dim or self.num_tokens not in (None, tokens.shape[1]):
            raise InputError(
                f"report decoder: CT tokens of shape {tuple(tokens.shape)}, expected (B, {self.num_tokens or 'T'},"
                f" {self.token_dim}). Use the CT encoder and the volume spec that it was trained with."
            )
        memory: Tensor = self.projection(tokens)
        return memory if self.places is None else memory + self.places

    def forward(
        self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predictions of the next token of reports in view of the CT tokens, for `losses.report.report_loss`.

        Args:
            tokens: (B, T, D_c).
            input_ids: (B, L), as `tokenize` gives them.
            attention_mask: (B, L).
            labels: (B, L), -100 where nothing is to be predicted; None for every real token.

        Returns:
            (B, L - 1, V) float32 logits, and what they are to predict, (B, L - 1) int64.
        """
        labels = input_ids.masked_fill(attention_mask == 0, -100) if labels is None else labels
        out = self.decoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=self._memory(tokens)
        )
        return out.logits[:, :-1].float(), labels[:, 1:]

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, max_new_tokens: int = 128, num_beams: int = 1, no_repeat_ngram_size: int = 0
    ) -> list[str]:
        """Write a report for each volume, greedily or with beams; the module's mode is left as it was.

        Args:
            tokens: (B, T, D_c).
            max_new_tokens: longest report.
            num_beams: 1 for greedy.
            no_repeat_ngram_size: 0 for no such rule.
        """
        from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

        was_training = self.training
        self.eval()
        start = torch.full((tokens.shape[0], 1), self._start, device=tokens.device)
        decoder: Any = self.decoder
        ids = decoder.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=self._memory(tokens),
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),  # BERT does not make its own
            generation_config=GenerationConfig(
                max_new_tokens=min(max_new_tokens, self.max_length - 1),
                num_beams=num_beams,
                do_sample=False,
                no_repeat_ngram_size=no_repeat_ngram_size,
                bos_token_id=self._start,
                eos_token_id=self._end,
                pad_token_id=self._pad,
            ),
        )
        self.train(was_training)
        return [str(text).strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def save(self, folder: Path, upstream: Mapping[str, str]) -> Artefact:
        """Write the artefact `report-decoder` with its tokenizer.

        Args:
            folder: where.
            upstream: fingerprints of what it was made from (the CT encoder's, above all).
        """
        model_config: Any = self.decoder.config
        values = {k: v for k, v in model_config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
        config = {
            "token_dim": self.token_dim,
            "num_tokens": self.num_tokens,
            "max_length": self.max_length,
            "decoder": hash_json(values),
            "tokenizer": tokenizer_hash(self.tokenizer),
        }

        def write_decoder(place: Path) -> None:
            model_config.save_pretrained(place / DECODER_FOLDER)
            self.tokenizer.save_pretrained(place / DECODER_FOLDER)

        return write_artefact(folder, "report-decoder", config, self.state_dict(), upstream, extra=write_decoder)

    @staticmethod
    def load(folder: Path) -> tuple[ReportDecoder, Artefact]:
        """Read a `report-decoder` artefact, in eval mode.

        Raises:
            InputError: it is missing, of another kind, or its weights do not fit.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        artefact = read_artefact(folder, "report-decoder")
        place = str(folder / DECODER_FOLDER)
        try:
            decoder = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place))
            tokenizer = AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError) as error:
            raise InputError(f"{place}: no decoder ({str(error)[:200]}). Run the stage that makes it again.") from error
        config = artefact.config
        model = ReportDecoder(decoder, tokenizer, config["token_dim"], config["num_tokens"], config["max_length"])
        load_weights(model, artefact.weights(), source=str(folder))
        return model.eval(), artefact
