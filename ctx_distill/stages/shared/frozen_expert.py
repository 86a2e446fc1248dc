"""The frozen X-ray expert and the index built with it, opened together and checked against each other."""

from __future__ import annotations

from pathlib import Path

from ctx_distill.checkpoint import require_same
from ctx_distill.models.opening import open_expert
from ctx_distill.models.report_encoder import ReportEncoder, open_report_encoder
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.retrieval.index import Device, Placement
from ctx_distill.retrieval.store import XrayIndexArtefact


def open_teacher(
    expert: str,
    revision: str | None,
    index: str,
    placement: Placement = "replicated",
    device: Device = "auto",
    searched: bool = True,
) -> tuple[XrayExpert, XrayIndexArtefact]:
    """Open an expert and an index.

    Args:
        expert: folder or hub name.
        revision: pinned commit of a hub expert.
        index: folder of the stage-1 artefact.
        placement: of the index over the ranks; see `XrayIndexArtefact.open`.
        device: of the index, once the task's `setup` places it: the rank's own device is not set before.
        searched: whether the task looks anything up; see `XrayIndexArtefact.open`.

    Raises:
        InputError: one cannot be had, or the index was built with another expert.
    """
    teacher = open_expert(expert, revision)
    store = XrayIndexArtefact.open(Path(index), device, placement=placement, searched=searched)
    require_same(
        f"the expert {expert}", teacher.fingerprint(),
        f"the expert that the index {index} was built with", store.expert_fingerprint,
        "Build the index again with this expert (`ctx-distill index`), or give the expert that it was built with.",
    )  # fmt: skip
    return teacher, store


def open_queries(teacher: XrayExpert, store: XrayIndexArtefact) -> ReportEncoder:
    """What embeds the CT reports that the index is asked with: the teacher, or the index's own report encoder.

    Raises:
        InputError: the report encoder cannot be had, or is not the one that the index was built with.
    """
    asked = store.report_source
    if asked is None:
        return teacher
    encoder = open_report_encoder(asked.source, asked.revision)
    require_same(
        f"the report encoder {asked.source}", encoder.fingerprint(),
        f"the report encoder that the index {store.folder} was built with", asked.fingerprint,
        "Build the index again (`ctx-distill index`), or put back the files that it was built with.",
    )  # fmt: skip
    return encoder
