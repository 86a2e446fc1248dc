"""Which contrastive loss stage 3 minimises, and what goes together with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ctx_distill.errors import InputError
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.stages.align.evidence import RobustSettings

Objective = Literal["infonce", "siglip", "soft-targets"]


@dataclass(frozen=True)
class SoftTargetSettings:
    """Targets that are a softmax of report similarities (`ctx_distill.losses.soft_targets`).

    Attributes:
        weight: of that softmax, against 1 - weight of the pairs themselves.
        temperature: of that softmax; None takes the expert's own.
    """

    weight: float = 0.2
    temperature: float | None = None


def check_objective(objective: Objective, robust: RobustSettings) -> None:
    """Refuse corrections beside an objective that has none.

    Raises:
        InputError: the objective is not InfoNCE, and evidence of false negatives is switched on.
    """
    if objective != "infonce" and robust.evidence:
        raise InputError(
            f"stage 3: objective is {objective}, but robust.evidence is [{', '.join(robust.evidence)}], and corrected"
            " false negatives belong to infonce alone. Set robust.evidence=[] too"
            " (--model.init_args.robust.evidence=[])."
        )


def own_temperature(settings: SoftTargetSettings, expert: XrayExpert) -> float:
    """The temperature of the soft targets.

    Raises:
        InputError: none is given and the expert has none, or a setting is out of range.
    """
    if not 0 <= settings.weight <= 1 or (settings.temperature is not None and settings.temperature <= 0):
        raise InputError(
            f"stage 3: soft_targets.weight is {settings.weight} and soft_targets.temperature {settings.temperature};"
            " expected a weight from 0 to 1, and a temperature above 0 or null."
        )
    if settings.temperature is not None:
        return settings.temperature
    if expert.logit_scale is None:
        raise InputError(
            f"{expert.name}: names no temperature of its own; set --model.init_args.soft_targets.temperature=0.05."
        )
    return 1.0 / expert.logit_scale
