"""Reports written from CT tokens: a causal language model with cross-attention to them, or with them as its prefix.

A model that knows cross-attention (GPT-2, BERT, RoBERTa) gets it. Others (Llama, Qwen, Mistral, Phi) read the projected tokens
as the first places of their sequence, as LLaVA does (Liu et al., arXiv 2304.08485): no model's code is changed, so that
any causal model fits, with its cache and LoRA; it costs T places of the context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ctx_distill.models.lora import CROSS_ATTENTION, LoraSettings, add_lora
from ctx_distill.models.sampling import SamplingSettings, sampling_steps
from ctx_distill.types import InputError


class ReportDecoder(nn.Module):
    """A Hugging Face causal decoder that attends to CT tokens (B, T, D_c) through a projection.

    Attributes:
        token_dim: D_c.
        num_tokens: T, where the tokens' places are learnt; None for tokens without places.
        max_length: longest report in tokens, marks included.
        prefix: the CT tokens are the decoder's first places, since it has no cross-attention.
    """

    def __init__(
        self,
        decoder: nn.Module,
        tokenizer: Any,
        token_dim: int,
        num_tokens: int | None = None,
        max_length: int = 256,
        lora: LoraSettings | None = None,
        base: Mapping[str, Any] | None = None,
    ) -> None:
        """Take over a built decoder; those of `models/decoder_sources.py` are the ways to get one.

        Args:
            decoder: a transformers model with a language-model head.
            tokenizer: its tokenizer, with pad, and cls and sep (or bos and eos) tokens.
            token_dim: D_c.
            num_tokens: T; without it a token carries its place only as far as the CT encoder put it there.
            max_length: longest report in tokens.
            lora: train adapters alone; None trains all.
            base: source, revision and hash of the weights that the adapters are for.

        Raises:
            InputError: the tokenizer lacks a mark, or the CT tokens leave no room for a report.
        """
        super().__init__()
        self._start = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
        self._end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self._end
        if self._start is None or self._end is None:
            raise InputError("report decoder: its tokenizer has no [CLS]/[SEP] and no bos/eos tokens; expected a pair.")
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.token_dim = token_dim
        self.num_tokens = num_tokens
        self.prefix = not any(CROSS_ATTENTION.search(name.lower()) for name, _ in decoder.named_modules())
        self.lora, self.base = lora, dict(base or {})
        if lora is not None:
            add_lora(decoder, lora)
        config: Any = decoder.config
        context = int(getattr(config, "max_position_embeddings", max_length))
        room = context - (num_tokens or 0) if self.prefix else context
        if room < 3:
            raise InputError(
                f"report decoder: {type(decoder).__name__} has no cross-attention, so the {num_tokens} CT tokens stand in"
                f" front of the report, and its context of {context} places has no room for it. Use a model with a"
                " longer context, or one that knows cross-attention (GPT-2, BERT, RoBERTa)."
            )
        self.max_length = min(max_length, room)
        hidden = int(config.hidden_size)
        self.projection = nn.Sequential(nn.LayerNorm(token_dim), nn.Linear(token_dim, hidden))
        self.places = nn.Parameter(torch.randn(num_tokens, hidden) * 0.02) if num_tokens else None

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
        memory = self._memory(tokens)
        if self.prefix:
            seen = attention_mask.new_ones(memory.shape[:2])
            out = self.decoder(
                inputs_embeds=self._after(memory, input_ids), attention_mask=torch.cat([seen, attention_mask], 1)
            )
            return out.logits[:, memory.shape[1] : -1].float(), labels[:, 1:]
        out = self.decoder(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=memory)
        return out.logits[:, :-1].float(), labels[:, 1:]

    def _after(self, memory: Tensor, ids: Tensor) -> Tensor:
        """(B, T + L, D) what a decoder without cross-attention reads: CT tokens, then words."""
        decoder: Any = self.decoder
        words: Tensor = decoder.get_input_embeddings()(ids)
        return torch.cat([memory.to(words), words], dim=1)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int = 128,
        num_beams: int = 1,
        no_repeat_ngram_size: int = 0,
        min_new_tokens: int = 0,
        length_penalty: float = 1.0,
        sampling: SamplingSettings | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Write a report for each volume: greedily, with beams, or by sampling; the module's mode is left as it was.

        Args:
            tokens: (B, T, D_c).
            max_new_tokens: longest report.
            num_beams: 1 for greedy.
            no_repeat_ngram_size: 0 for no such rule.
            min_new_tokens: no end before so many.
            length_penalty: power of the length that a beam's score is divided by.
            sampling: how to sample; None takes the likeliest.
            seeds: B numbers; a report is a function of its tokens and its seed.

        Raises:
            InputError: sampling with beams, without seeds, or a shortest report longer than the longest.
        """
        from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

        longest = min(max_new_tokens, self.max_length - 1)
        if min_new_tokens > longest:
            raise InputError(
                f"report decoder: at least {min_new_tokens} tokens and at most {longest} were asked for. Lower"
                " min_length or raise max_length."
            )
        was_training = self.training
        self.eval()
        start = torch.full((tokens.shape[0], 1), self._start, device=tokens.device)
        memory, decoder = self._memory(tokens), cast(Any, self.decoder)
        inputs: dict[str, Any]
        if self.prefix:
            words = self._after(memory, start)
            inputs = {"inputs_embeds": words, "attention_mask": start.new_ones(words.shape[:2])}
        else:
            inputs = {
                "input_ids": start,
                "attention_mask": torch.ones_like(start),
                "encoder_hidden_states": memory,
                "past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache()),  # BERT does not make its own
            }
        ids = decoder.generate(
            **inputs,
            logits_processor=sampling_steps(sampling, seeds, num_beams) if sampling is not None else None,
            generation_config=GenerationConfig(
                max_new_tokens=longest,
                min_new_tokens=min_new_tokens or None,
                num_beams=num_beams,
                length_penalty=length_penalty,
                do_sample=False,
                no_repeat_ngram_size=no_repeat_ngram_size,
                bos_token_id=self._start,
                eos_token_id=self._end,
                pad_token_id=self._pad,
            ),
        )
        self.train(was_training)
        return [str(text).strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
