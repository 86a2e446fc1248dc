"""Create report decoders: a small one from scratch, or from any Hugging Face causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ctx_distill.models.lora import CROSS_ATTENTION, LoraSettings
from ctx_distill.models.report_decoder import ReportDecoder
from ctx_distill.types import InputError


def small_decoder(
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
    """Return a small GPT-2 with random weights and a WordPiece tokenizer trained on reports.

    Args:
        texts: reports of the train split.
        folder: folder for the tokenizer.
        token_dim: D_c.
        num_tokens: T.
        vocab_size: max vocabulary size of the tokenizer.
        width: hidden size, a multiple of 32.
        layers: number of layers.
        max_length: max length of a report in tokens.
        dropout: dropout rate.
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
    return ReportDecoder(GPT2LMHeadModel(config), tokenizer, token_dim, num_tokens, max_length)


def pretrained_decoder(
    source: str,
    token_dim: int,
    num_tokens: int | None = None,
    revision: str | None = None,
    max_length: int = 256,
    lora: LoraSettings | None = None,
) -> ReportDecoder:
    """Open a language model from a folder or a pinned hub repository, with new cross-attention if supported.

    Args:
        source: folder, or `hf-hub:organisation/name`.
        token_dim: D_c.
        num_tokens: T.
        revision: full commit hash of a hub repository.
        max_length: max length of a report in tokens.
        lora: train only adapters with these settings.

    Raises:
        InputError: the model is not available, needs remote code, or lacks weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from ctx_distill.models.weights import HUB, hash_weights, read_license, refuse_remote_code, resolve_source

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
            f"{folder}: not a causal language model ({str(error)[:300]}). Expected"
            " config.json, model.safetensors and tokenizer.json."
        ) from error
    missing = sorted(key for key in info["missing_keys"] if not CROSS_ATTENTION.search(key))
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} tensors of {type(model).__name__} are missing in the weights ({', '.join(missing[:3])})."
            " Use the config.json that belongs to the weights."
        )
    needed = lora is not None or source.startswith(HUB)  # to open the artefact; otherwise only recorded for provenance
    base = {
        "source": source if needed else Path(source).name,
        "revision": revision,
        "hash": hash_weights(list(folder.glob("*.safetensors"))),
    }
    base["license"] = read_license(folder)
    return ReportDecoder(model, tokenizer, token_dim, num_tokens, max_length, lora, base)
