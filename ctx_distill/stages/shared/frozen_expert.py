"""Open the frozen X-ray expert together with the index that was built with it, and check that they match."""

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
        expert: Folder or hub name.
        revision: Pinned commit of a hub expert.
        index: Folder of the stage-1 artefact.
        placement: How the index is distributed over the ranks; see `XrayIndexArtefact.open`.
        device: Device of the index. The task's `setup` moves the index there, because the rank's device is not set
            before.
        searched: Whether the task searches the index; see `XrayIndexArtefact.open`.

    Returns:
        The expert and the index.

    Raises:
        InputError: The expert or the index cannot be opened, or the index was built with another expert.
    """
    teacher = open_expert(expert, revision)
    store = XrayIndexArtefact.open(Path(index), device, placement=placement, searched=searched)
    require_same(
        f"the expert {expert}", teacher.fingerprint(),
        f"the expert that the index {index} was built with", store.expert_fingerprint,
        "Rebuild the index with this expert (`ctx-distill index`), or pass the expert that it was built with.",
    )  # fmt: skip
    return teacher, store


def open_queries(teacher: XrayExpert, store: XrayIndexArtefact) -> ReportEncoder:
    """Return the encoder of the CT reports that query the index: the teacher, or the index's separate report encoder.

    Raises:
        InputError: The report encoder cannot be opened, or differs from the one that the index was built with.
    """
    source = store.report_source
    if source is None:
        return teacher
    encoder = open_report_encoder(source.source, source.revision)
    require_same(
        f"the report encoder {source.source}", encoder.fingerprint(),
        f"the report encoder that the index {store.folder} was built with", source.fingerprint,
        "Rebuild the index (`ctx-distill index`), or restore the files that it was built with.",
    )  # fmt: skip
    return encoder
