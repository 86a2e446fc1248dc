"""The X-rays of the pool that lie nearest to a CT, image to image.

Stage 2 draws the CT's feature towards the X-ray expert's image features u_j, and stage 3 keeps the expert's space where its
text tower is the expert's and there is no projection: then <h, u_j> compares a CT with an X-ray, with no report of the CT.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctx_distill.checkpoint import Artefact, require_same
from ctx_distill.data.radiograph import read_radiograph
from ctx_distill.errors import InputError
from ctx_distill.explorer.answers import Neighbour
from ctx_distill.models.dual_encoder import DualEncoder
from ctx_distill.page.gather import gather
from ctx_distill.retrieval.store import XrayIndexArtefact

if TYPE_CHECKING:
    from ctx_distill.data.manifest import Manifest
    from ctx_distill.explorer.reader import ReaderSettings

_CHUNK = 65_536
_PIXELS = 480


class NearestXrays:
    """Looks up the nearest X-rays.

    Args:
        settings: the index's folder, how many, and what of the pool may be shown.
        model: the CT's model.
        artefact: its.

    Raises:
        InputError: the index is of another X-ray expert, or the model's space is not the expert's.
    """

    def __init__(self, settings: ReaderSettings, model: DualEncoder, artefact: Artefact) -> None:
        assert settings.index is not None
        folder = settings.index / "artefact" if (settings.index / "artefact").is_dir() else settings.index
        self.store = XrayIndexArtefact.open(folder, device="cpu")
        if "xray-expert" not in artefact.upstream:
            raise InputError(f"{artefact.folder}: does not name its X-ray expert; leave --index out")
        require_same(
            f"the X-ray expert of {folder}", self.store.expert_fingerprint,
            f"the X-ray expert of {artefact.folder}", artefact.upstream["xray-expert"],
            "Give the index of the same run, or leave --index out.",
        )  # fmt: skip
        if artefact.config["projection_dim"] is not None or model.embed_dim != self.store.value_dim:
            raise InputError(
                f"{artefact.folder}: its features ({model.embed_dim} dimensions, projected) do not lie in the space of the "
                f"X-ray expert ({self.store.value_dim}), so that CT and X-ray cannot be compared; leave --index out, or "
                "train stage 3 with text.tower=expert and text.projection_dim=null"
            )
        self._count, self._shown = min(settings.neighbours, len(self.store)), settings.show_reports
        self._manifest = self._pool_manifest(folder) if settings.show_reports else None
        self.told = (
            "Of the index, the X-rays whose picture the X-ray expert describes most like the model describes this CT "
            "(cosine of the two, 1 at most). No report of the CT enters. Near pictures need not share a diagnosis."
        )

    def _pool_manifest(self, folder: Path) -> Manifest | None:
        """For pictures: the manifest that the run names, where it is the one that was indexed."""
        run = gather(folder.resolve().parent.parent)
        wanted = self.store.upstream.get("xray-manifest")
        return run.xray if run.xray is not None and run.xray.fingerprint == wanted else None

    @torch.no_grad()
    def __call__(self, image: Tensor) -> list[Neighbour]:
        """The nearest, nearest first; studies once.

        Args:
            image: (D,) unit row of the CT.
        """
        similarity = torch.cat(
            [
                F.normalize(self.store.features[start : start + _CHUNK].float(), dim=-1) @ image.cpu().float()
                for start in range(0, len(self.store), _CHUNK)
            ]
        )
        found: list[Neighbour] = []
        seen: set[str] = set()
        for position in similarity.argsort(descending=True, stable=True).tolist():
            item = self.store.items.iloc[position]
            if item["study_id"] in seen:
                continue
            seen.add(item["study_id"])
            found.append(self._neighbour(position, float(similarity[position])))
            if len(found) == self._count:
                break
        return found

    def _neighbour(self, position: int, similarity: float) -> Neighbour:
        item, findings = self.store.items.iloc[position], None
        if self.store.findings is not None:
            present = (self.store.findings[position] == 1).tolist()
            findings = [name for name, is_there in zip(self.store.finding_names, present, strict=True) if is_there]
        if not self._shown:
            return Neighbour(similarity, findings)
        report = str(item["report"]) if "report" in self.store.items.columns else None
        return Neighbour(similarity, findings, str(item["study_id"]), report, self._picture(int(item["row"])))

    def _picture(self, row: int) -> bytes | None:
        if self._manifest is None:
            return None
        from PIL import Image

        try:
            film = read_radiograph(self._manifest.image_file(row), self._manifest.inverted(row))
        except InputError:  # a pool's picture that is gone is no reason to refuse the scan
            return None
        picture = Image.fromarray((film * 255).round().astype(np.uint8))
        picture.thumbnail((_PIXELS, _PIXELS), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        picture.save(out, "PNG")
        return out.getvalue()
