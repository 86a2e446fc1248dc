"""A report decoder on disk: the artefact `report-decoder`, whole, or with LoRA what learnt and the name of its base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctx_distill.checkpoint import Artefact, load_weights, read_artefact, write_artefact
from ctx_distill.files import hash_json, write_json
from ctx_distill.models.decoder_sources import pretrained_decoder
from ctx_distill.models.lora import LoraSettings
from ctx_distill.models.report_decoder import ReportDecoder
from ctx_distill.models.text_tower import tokenizer_hash
from ctx_distill.types import InputError

DECODER_FOLDER = "decoder"
BASE_FILE = "base.json"
"""Beside the configuration of a decoder made of a pretrained model: source, revision, hash and licence of that."""


def save_decoder(model: ReportDecoder, folder: Path, upstream: Mapping[str, str]) -> Artefact:
    """Write the artefact `report-decoder` with its tokenizer; with LoRA, without the weights that did not learn.

    Args:
        model: the decoder.
        folder: where.
        upstream: fingerprints of what it was made from (the CT encoder's, above all).
    """
    model_config: Any = model.decoder.config
    values = {k: v for k, v in model_config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    config: dict[str, Any] = {
        "token_dim": model.token_dim,
        "num_tokens": model.num_tokens,
        "max_length": model.max_length,
        "decoder": hash_json(values),
        "tokenizer": tokenizer_hash(model.tokenizer),
    }
    tensors = model.state_dict()
    if model.lora is not None:
        config |= {"lora": model.lora.as_json(), "base": model.base["hash"]}
        tensors = {name: tensors[name] for name in _learnt(model)}

    def write_decoder(place: Path) -> None:
        model_config.save_pretrained(place / DECODER_FOLDER)
        model.tokenizer.save_pretrained(place / DECODER_FOLDER)
        if model.base:
            write_json(place / DECODER_FOLDER / BASE_FILE, model.base)

    return write_artefact(folder, "report-decoder", config, tensors, upstream, extra=write_decoder)


def load_decoder(folder: Path, source: str | None = None) -> tuple[ReportDecoder, Artefact]:
    """Read a `report-decoder` artefact, in eval mode.

    Args:
        folder: the artefact's.
        source: where the base model of a decoder with LoRA lies now; None for where it was.

    Raises:
        InputError: it is missing, of another kind, its weights do not fit, or its base model is another.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    artefact = read_artefact(folder, "report-decoder")
    if "lora" in artefact.config:
        return _load_adapters(folder, artefact, source), artefact
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


def _load_adapters(folder: Path, artefact: Artefact, source: str | None) -> ReportDecoder:
    """A decoder with LoRA: its base model from where that lies, what it learnt from the artefact."""
    config = artefact.config
    base = json.loads((folder / DECODER_FOLDER / BASE_FILE).read_text())
    model = pretrained_decoder(
        source or base["source"],
        config["token_dim"],
        config["num_tokens"],
        None if source else base["revision"],
        config["max_length"],
        LoraSettings.from_json(config["lora"]),
    )
    if model.base["hash"] != config["base"]:
        raise InputError(
            f"{source or base['source']}: weights {model.base['hash'][:12]}, but the adapters of {folder} are for"
            f" {config['base'][:12]}. Give the folder of the base model that they were trained on."
        )
    frozen = {name: value for name, value in model.state_dict().items() if name not in set(_learnt(model))}
    load_weights(model, {**frozen, **artefact.weights()}, source=str(folder))
    return model.eval()


def _learnt(model: ReportDecoder) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
