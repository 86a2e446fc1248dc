"""The frozen X-ray expert and the index built with it, opened together and checked against each other."""

from __future__ import annotations

from pathlib import Path

from ctx_distill.checkpoint import require_same
from ctx_distill.models.xray_expert import XrayExpert, open_expert
from ctx_distill.retrieval.store import XrayIndexArtefact


def open_teacher(expert: str, revision: str | None, index: str) -> tuple[XrayExpert, XrayIndexArtefact]:
    """Open an expert and an index.

    Raises:
        InputError: one cannot be had, or the index was built with another expert.
    """
    teacher = open_expert(expert, revision)
    store = XrayIndexArtefact.open(Path(index))
    require_same(
        f"the expert {expert}", teacher.fingerprint(),
        f"the expert that the index {index} was built with", store.expert_fingerprint,
        "Build the index again with this expert (make stage-1), or give the expert that it was built with.",
    )  # fmt: skip
    return teacher, store
