"""Select the contrastive loss of stage 3 and check that its settings are compatible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ctx_distill.errors import InputError
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.stages.align.evidence import RobustSettings

Objective = Literal["infonce", "siglip", "soft-targets"]


@dataclass(frozen=True)
class SoftTargetSettings:
    """Settings of targets that are a softmax of report similarities (`ctx_distill.losses.soft_targets`).

    Attributes:
        weight: Weight of the softmax; the true pairs have 1 - weight.
        temperature: Temperature of the softmax; None uses the expert's.
    """

    weight: float = 0.2
    temperature: float | None = None


def check_objective(objective: Objective, robust: RobustSettings) -> None:
    """Check that false negatives are corrected with InfoNCE only.

    Raises:
        InputError: The objective is not InfoNCE, and evidence of false negatives is enabled.
    """
    if objective != "infonce" and robust.evidence:
        raise InputError(
            f"stage 3: objective is {objective}, but robust.evidence is [{', '.join(robust.evidence)}], and only infonce"
            " supports corrections. Set robust.evidence=[] (--model.init_args.robust.evidence=[])."
        )


def soft_target_temperature(settings: SoftTargetSettings, expert: XrayExpert) -> float:
    """Return the temperature of the soft targets.

    Raises:
        InputError: No temperature is set and the expert has none, or a setting is out of range.
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
            f"{expert.name}: the expert has no temperature; set --model.init_args.soft_targets.temperature=0.05."
        )
    return 1.0 / expert.logit_scale
