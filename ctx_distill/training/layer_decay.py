"""Layer-wise learning-rate decay (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT): smaller rates near the input."""

from __future__ import annotations

from typing import Any

from torch import nn

from ctx_distill.models.ct_encoder import CTEncoder
from ctx_distill.training.base_task import decay_groups


def layer_groups(encoder: CTEncoder, decay: float) -> list[dict[str, Any]]:
    """Return the parameter groups of an encoder whose head has factor 1.

    Args:
        encoder: An encoder of L layers, ordered from the input.
        decay: Learning rate of a layer relative to the next layer towards the head.

    Returns:
        Groups with `lr_factor` = decay^(L - l) for layer l = 0 ... L - 1; parameters outside all layers are treated as
        layer 0.
    """
    layers = encoder.layers()
    groups: list[dict[str, Any]] = []
    for depth, modules in enumerate(layers):
        layer = nn.ModuleList(modules)
        groups += [group | {"lr_factor": decay ** (len(layers) - depth)} for group in decay_groups(layer)]
    taken = [parameter for group in groups for parameter in group["params"]]
    return groups + [group | {"lr_factor": decay ** len(layers)} for group in decay_groups(encoder, without=taken)]
