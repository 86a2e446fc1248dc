"""The CT's own projection as a prior of its image feature (**ours**).

    h_i = norm(norm(P_a f(V_i)) + w u'_i),   u'_i = norm(E_v(projection of V_i))

The CT encoder trains without it; what the frozen X-ray expert says of the projection is added wherever the image feature
is used. The paper's student has to learn that from pairs; where pairs are few it does not get there. Trained with the
prior in the loss, the encoder learns less of its own and nothing is gained (docs/protocol.md).
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
    """Attributes:
    weight: w, against 1 of the CT encoder's own feature; 0 leaves the prior out. It needs
        `data.init_args.projection=true` in stage 3 and wherever the model is used.
    """

    weight: float = 0.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise InputError(f"stage 3: prior.weight is {self.weight}; expected 0 or more.")


class ProjectionPrior:
    """u' of batches, each row embedded once.

    Args:
        expert: the frozen expert.
        space: dimension of the joint space.

    Raises:
        InputError: the expert's image features do not lie in the joint space.
    """

    def __init__(self, expert: XrayExpert, space: int) -> None:
        # Imported here because it brings Lightning, which inference does without.
        from ctx_distill.stages.distill.targets import ProjectionTeacher

        check_space(expert, space)
        self.expert, self._teacher = expert, ProjectionTeacher()

    def features(self, batch: CTBatch) -> Tensor:
        """(b, D) unit rows.

        Raises:
            InputError: the batch carries no projections.
        """
        return self._teacher.targets(batch, self.expert.to(batch.row.device))


def check_space(expert: XrayExpert, space: int) -> None:
    """Check that the expert's image features lie in the joint space.

    Raises:
        InputError: they do not.
    """
    if expert.embed_dim != space:
        raise InputError(
            f"stage 3: prior.weight is set, but the joint space has {space} dimensions and the expert's image space "
            f"{expert.embed_dim}. Keep the expert's own space (text.tower=expert, text.projection_dim=null)."
        )


def open_prior(artefact: Artefact, space: int) -> ProjectionPrior | None:
    """Return the prior of a dual encoder's artefact; None if it has none. Raises as `open_prior_expert`."""
    expert = open_prior_expert(artefact, space)
    return None if expert is None else ProjectionPrior(expert, space)


def open_prior_expert(artefact: Artefact, space: int) -> XrayExpert | None:
    """Open the copy of the X-ray expert in a dual encoder's artefact; None if the model has no prior.

    Raises:
        InputError: the copy is not the expert that the model was trained with, or its image features do not lie in the
            joint space.
    """
    if not artefact.config.get("prior_weight"):
        return None
    folder = Path(artefact.folder) / PRIOR_FOLDER
    expert = open_expert(str(folder))
    require_same(
        f"the expert in {folder}", expert.fingerprint(),
        f"the expert that {artefact.folder} was trained with", artefact.upstream["xray-expert"],
        "Run `ctx-distill align` again.",
    )  # fmt: skip
    check_space(expert, space)
    return expert
