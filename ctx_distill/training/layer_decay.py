"""Layer-wise learning-rate decay (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT): layers near the input learn slower."""

from __future__ import annotations

from typing import Any

from torch import nn

from ctx_distill.models.ct_encoder import CTEncoder
from ctx_distill.training.base_task import decay_groups


def layer_groups(encoder: CTEncoder, decay: float) -> list[dict[str, Any]]:
    """Parameter groups of an encoder, for a head in front of it at factor 1.

    Args:
        encoder: with L layers, the input's first.
        decay: of one layer against the next towards the head.

    Returns:
        Groups with `lr_factor` = decay^(L - l) for layer l = 0 ... L - 1; what is in no layer goes with the input's.
    """
    layers = encoder.layers()
    groups: list[dict[str, Any]] = []
    for depth, modules in enumerate(layers):
        own = nn.ModuleList(modules)
        groups += [group | {"lr_factor": decay ** (len(layers) - depth)} for group in decay_groups(own)]
    taken = [parameter for group in groups for parameter in group["params"]]
    return groups + [group | {"lr_factor": decay ** len(layers)} for group in decay_groups(encoder, without=taken)]
