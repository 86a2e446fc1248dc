"""The X-rays of the pool that lie nearest to a CT, image to image, with what may be shown of them.

Stage 2 draws the CT's feature towards the X-ray expert's image features u_j, and stage 3 keeps the expert's space where its
text tower is the expert's and nothing projects it: then the cosine of both compares a CT with an X-ray.
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
    """The lookup, or None and why there is none.

    Raises:
        InputError: an index was asked for that does not fit the model.
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
    """Looks up the nearest X-rays.

    Attributes:
        folder: of the index.
        store: the index.
        told: what "nearest" means.

    Args:
        parts: of the model.
        settings: how many, and whether the pool may be shown.

    Raises:
        InputError: the index is of another X-ray expert, or the model's space is not the expert's.
    """

    def __init__(self, parts: Parts, settings: ReaderSettings) -> None:
        assert parts.index is not None
        self.folder = parts.index
        self.store = XrayIndexArtefact.open(self.folder, device="cpu")
        artefact = parts.dual_artefact
        if artefact is None or "xray-expert" not in artefact.upstream or artefact.config["projection_dim"] is not None:
            raise InputError(
                f"{parts.source}: its features do not lie in the space of an X-ray expert, so that CT and X-ray cannot be "
                "compared; expected a dual encoder trained with text.tower=expert and no text.projection_dim, train one "
                "or leave --index out"
            )
        require_same(
            f"the X-ray expert of {self.folder}", self.store.expert_fingerprint,
            f"the X-ray expert of {artefact.folder}", artefact.upstream["xray-expert"],
            "Give the index of the same run, or leave --index out.",
        )  # fmt: skip
        self._count, self._shown = settings.neighbours, settings.show_reports
        self._manifest = self._pool_manifest() if settings.show_reports else None
        self._places = {str(name): place for place, name in enumerate(self.store.items["image_id"])}
        self.told = (
            "The X-rays of the index whose pictures the X-ray expert describes most as the model describes this CT "
            "(cosine of the two embeddings, 1 at most). Near ones need not share its findings."
        )

    def _pool_manifest(self) -> Manifest | None:
        """For pictures: the manifest that the index's run names, where it is the one that was indexed."""
        pool = gather(self.folder.resolve().parent.parent).xray
        return pool if pool is not None and pool.fingerprint == self.store.upstream.get("xray-manifest") else None

    def find(self, model: CTModel, said: Prediction) -> list[ShownXray]:
        """The nearest, nearest first."""
        return [self._described(one.image_id, one.similarity) for one in model.nearest(said, self._count)]

    def _described(self, image_id: str, similarity: float) -> ShownXray:
        place, findings = self._places[image_id], None
        if self.store.findings is not None:
            found = dict(zip(self.store.finding_names, self.store.findings[place].tolist(), strict=True))
            findings = [name for name, value in found.items() if value == 1]
            findings += [f"{name} (uncertain)" for name, value in found.items() if value == -1]
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
        except InputError:  # a pool's picture that is gone is no reason to refuse the scan
            return None
        picture = Image.fromarray((film * 255).round().astype(np.uint8))
        picture.thumbnail((_PIXELS, _PIXELS), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        picture.save(out, "PNG")
        return out.getvalue()
