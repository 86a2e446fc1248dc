"""Add LoRA adapters (Hu et al., arXiv 2106.09685) to a report decoder with peft; the base model stays frozen."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

CROSS_ATTENTION = re.compile(r"cross_?att|encoder_attn")
"""Names of modules that attend to the CT tokens; new in a pretrained model, and fully trained."""


@dataclass(frozen=True)
class LoraSettings:
    """Settings of the adapters.

    Attributes:
        rank: rank of the adapters.
        alpha: the adapters' output is scaled by alpha / rank.
        dropout: dropout rate of the adapters' input.
        targets: names of the adapted linear layers, or `all-linear` for all except the output head.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: str | tuple[str, ...] = "all-linear"

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        values = asdict(self)
        return values | {"targets": self.targets if isinstance(self.targets, str) else list(self.targets)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LoraSettings:
        """Create settings from the values of `as_json`."""
        targets = values["targets"]
        return cls(**(values | {"targets": targets if isinstance(targets, str) else tuple(targets)}))


def add_lora(decoder: nn.Module, settings: LoraSettings) -> None:
    """Add adapters to a decoder in place, and freeze everything except them and the cross-attention.

    Args:
        decoder: a transformers model.
        settings: settings of the adapters.
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
