"""Projection prior: add the frozen expert's embedding of the CT's own projection to the CT's image feature (**ours**).

    h_i = norm(norm(P_a f(V_i)) + w u'_i),   u'_i = norm(E_v(projection of V_i))

The CT encoder is trained without the projection prior. The prior is added at inference, wherever the image feature is
used. With the prior in the training loss, the encoder learns less and the result does not improve (docs/protocol.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ctx_distill.checkpoint import Artefact, require_same
from ctx_distill.errors import InputError
from ctx_distill.models.dual_encoder import PRIOR_FOLDER
from ctx_distill.models.opening import open_expert
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.types import CTBatch


@dataclass(frozen=True)
class PriorSettings:
    """Settings of the projection prior.

    Attributes:
        weight: w, relative to 1 for the CT encoder's feature; 0 disables the prior. A weight above 0 requires
            `data.init_args.projection=true` in stage 3 and wherever the model is used.

    Raises:
        InputError: The weight is negative.
    """

    weight: float = 0.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise InputError(f"stage 3: prior.weight is {self.weight}; expected 0 or more.")


class ProjectionPrior:
    """Compute u' for batches, embedding each row once.

    Args:
        expert: The frozen expert.
        space: Dimension of the joint space.

    Raises:
        InputError: The expert's image features are not in the joint space.
    """

    def __init__(self, expert: XrayExpert, space: int) -> None:
        # Imported here because it imports Lightning, which inference does not need.
        from ctx_distill.stages.distill.targets import ProjectionTeacher

        check_space(expert, space)
        self.expert, self._teacher = expert, ProjectionTeacher()

    def features(self, batch: CTBatch) -> Tensor:
        """Return u' of a batch, unit rows (b, D).

        Raises:
            InputError: The batch contains no projections.
        """
        return self._teacher.targets(batch, self.expert.to(batch.row.device))


def check_space(expert: XrayExpert, space: int) -> None:
    """Check that the expert's image features are in the joint space.

    Raises:
        InputError: They are not.
    """
    if expert.embed_dim != space:
        raise InputError(
            f"stage 3: prior.weight is set, but the joint space has {space} dimensions and the expert's image space "
            f"has {expert.embed_dim}. Use the expert's space (text.tower=expert, text.projection_dim=null)."
        )


def open_prior(artefact: Artefact, space: int) -> ProjectionPrior | None:
    """Return the projection prior of a dual encoder, or None if it has none. Raises as `open_prior_expert`."""
    expert = open_prior_expert(artefact, space)
    return None if expert is None else ProjectionPrior(expert, space)


def open_prior_expert(artefact: Artefact, space: int) -> XrayExpert | None:
    """Open the copy of the expert in the artefact of a dual encoder, or return None if it was trained without a prior.

    Raises:
        InputError: The copy is not the expert that the model was trained with, or its image features are not in the
            joint space.
    """
    if not artefact.config.get("prior_weight"):
        return None
    folder = Path(artefact.folder) / PRIOR_FOLDER
    expert = open_expert(str(folder))
    require_same(
        f"the expert in {folder}", expert.fingerprint(),
        f"the expert that {artefact.folder} was trained with", artefact.upstream["xray-expert"],
        "Rerun `ctx-distill align`.",
    )  # fmt: skip
    check_space(expert, space)
    return expert
