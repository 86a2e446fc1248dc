"""Look up the X-rays of the pool that are most similar to a CT.

Stage 2 distils the CT's features towards the X-ray expert's image features u_j. Stage 3 keeps the expert's space if its text
tower is the expert's and has no projection. CT and X-ray features can then be compared by cosine similarity.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctx_distill.checkpoint import require_same
from ctx_distill.data.io.radiograph import read_radiograph
from ctx_distill.errors import InputError
from ctx_distill.explorer.answers import ShownXray
from ctx_distill.retrieval.store import XrayIndexArtefact
from ctx_distill.runs.run_reader import gather

if TYPE_CHECKING:
    from ctx_distill.data.manifests.manifest import Manifest
    from ctx_distill.explorer.reader_settings import ReaderSettings
    from ctx_distill.inference.model import CTModel
    from ctx_distill.inference.parts import Parts
    from ctx_distill.inference.prediction import Prediction

_PIXELS = 480


def open_nearest(parts: Parts, settings: ReaderSettings) -> tuple[NearestXrays | None, str]:
    """Open the lookup, or return None and the reason.

    Raises:
        InputError: An index was specified that does not match the model.
    """
    if parts.index is None:
        return None, "none"
    try:
        return NearestXrays(parts, settings), ""
    except InputError as error:
        if settings.index is not None:
            raise
        return None, f"not used. {error}"


class NearestXrays:
    """Look up the nearest X-rays.

    Attributes:
        folder: Folder of the index.
        store: The index.
        explanation: a sentence that explains "nearest".

    Args:
        parts: Parts of the model.
        settings: Number of X-rays, and whether the pool may be shown.

    Raises:
        InputError: The index is of another X-ray expert, or the model's space is not the expert's.
    """

    def __init__(self, parts: Parts, settings: ReaderSettings) -> None:
        assert parts.index is not None
        self.folder = parts.index
        self.store = XrayIndexArtefact.open(self.folder, device="cpu")
        artefact = parts.dual_artefact
        if artefact is None or "xray-expert" not in artefact.upstream or artefact.config["projection_dim"] is not None:
            raise InputError(
                f"{parts.source}: its features are not in the space of an X-ray expert, so CTs and X-rays cannot be compared; "
                "expected a dual encoder trained with text.tower=expert and no text.projection_dim. Train one, or remove "
                "--index"
            )
        require_same(
            f"the X-ray expert of {self.folder}", self.store.expert_fingerprint,
            f"the X-ray expert of {artefact.folder}", artefact.upstream["xray-expert"],
            "Use the index of the same run, or remove --index.",
        )  # fmt: skip
        self._count, self._shown = settings.neighbours, settings.show_reports
        self._manifest = self._pool_manifest() if settings.show_reports else None
        self._places = {str(name): place for place, name in enumerate(self.store.items["image_id"])}
        self.explanation = (
            "The X-rays of the index whose embeddings are most similar to this CT's (cosine similarity, at most 1). Similar "
            "X-rays need not have the same findings."
        )

    def _pool_manifest(self) -> Manifest | None:
        """Return the X-ray manifest of the index's run, for images, if it is the one that was indexed."""
        pool = gather(self.folder.resolve().parent.parent).xray
        return pool if pool is not None and pool.fingerprint == self.store.upstream.get("xray-manifest") else None

    def find(self, model: CTModel, prediction: Prediction) -> list[ShownXray]:
        """Return the nearest X-rays, most similar first."""
        return [self._described(one.image_id, one.similarity) for one in model.nearest(prediction, self._count)]

    def _described(self, image_id: str, similarity: float) -> ShownXray:
        place, findings = self._places[image_id], None
        if self.store.findings is not None:
            values = dict(zip(self.store.finding_names, self.store.findings[place].tolist(), strict=True))
            findings = [name for name, value in values.items() if value == 1]
            findings += [f"{name} (uncertain)" for name, value in values.items() if value == -1]
        if not self._shown:
            return ShownXray(similarity, findings)
        item = self.store.items.iloc[place]
        report = str(item["report"]) if "report" in self.store.items.columns else None
        return ShownXray(similarity, findings, str(item["study_id"]), report, self._picture(int(item["row"])))

    def _picture(self, row: int) -> bytes | None:
        if self._manifest is None:
            return None
        from PIL import Image

        try:
            film = read_radiograph(Path(self._manifest.image_file(row)), self._manifest.inverted(row))
        except InputError:  # a missing image of the pool must not fail the scan
            return None
        picture = Image.fromarray((film * 255).round().astype(np.uint8))
        picture.thumbnail((_PIXELS, _PIXELS), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        picture.save(out, "PNG")
        return out.getvalue()
