"""LoRA of a report decoder (Hu et al., arXiv 2106.09685) through peft: low-rank adapters learn, the model stays as it is."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

CROSS_ATTENTION = re.compile(r"cross_?att|encoder_attn")
"""Names of the parts that attend to the CT tokens: in a pretrained model they are new, and learn whole."""


@dataclass(frozen=True)
class LoraSettings:
    """How large decoders are adapted.

    Attributes:
        rank: of the adapters.
        alpha: their output counts alpha / rank times.
        dropout: rate of the adapters' input.
        targets: names of the linear layers that get one, or `all-linear`: all but the output head.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: str | tuple[str, ...] = "all-linear"

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        return values | {"targets": self.targets if isinstance(self.targets, str) else list(self.targets)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LoraSettings:
        """The settings that `as_json` gave."""
        targets = values["targets"]
        return cls(**(values | {"targets": targets if isinstance(targets, str) else tuple(targets)}))


def add_lora(decoder: nn.Module, settings: LoraSettings) -> None:
    """Put adapters into a decoder, in place; all but them and its cross-attention is frozen.

    Args:
        decoder: a transformers model.
        settings: see there.
    """
    from peft import LoraConfig, inject_adapter_in_model

    attends = any(CROSS_ATTENTION.search(name) for name, _ in decoder.named_modules())
    inject_adapter_in_model(
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=settings.targets if isinstance(settings.targets, str) else list(settings.targets),
            exclude_modules=rf".*({CROSS_ATTENTION.pattern}).*" if attends else None,
            bias="none",
        ),
        decoder,
    )
    for name, parameter in decoder.named_parameters():
        if CROSS_ATTENTION.search(name):
            parameter.requires_grad_(True)
