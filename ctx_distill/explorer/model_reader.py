"""The explorer's model, opened with `ctx_distill.load`, and its description."""

from __future__ import annotations

import numpy as np
import torch

import ctx_distill
from ctx_distill.data.io.volume import Volume
from ctx_distill.explorer.answers import About, Answer, FindingAnswer, SaliencyMap, Tell
from ctx_distill.explorer.nearest import NearestXrays, open_nearest
from ctx_distill.explorer.reader_settings import ReaderSettings
from ctx_distill.inference.model import CTModel

_LUNG_HU = -500
_MARGIN = 1.05


def open_reader(settings: ReaderSettings) -> ModelReader:
    """Open the model for `serve`.

    Raises:
        InputError: The checkpoint or the index is missing or corrupt, or they do not match.
    """
    return ModelReader(settings)


class ModelReader:
    """See `Reader`."""

    def __init__(self, settings: ReaderSettings) -> None:
        available = "cuda" if torch.cuda.is_available() else "cpu"
        device = available if settings.device == "auto" else settings.device
        self.model: CTModel = ctx_distill.load(
            settings.checkpoint, index=settings.index, vocabulary=settings.vocabulary
        ).to(device)
        self._settings = settings
        self.nearest, why_not = open_nearest(self.model.parts, settings)
        self.about = About(
            self._facts(device, self.nearest, why_not),
            nearest="" if self.nearest is None else self.nearest.explanation,
            shows_pool=settings.show_reports,
        )

    def _facts(self, device: str, nearest: NearestXrays | None, why_not: str) -> dict[str, str]:
        parts, spec = self.model.parts, self.model.volume_spec
        artefacts = [
            f"{name} {artefact.fingerprint[:12]}"
            for name, artefact in (
                ("CT and report encoder", parts.dual_artefact),
                ("classifier", None if parts.classifier is None else parts.classifier.artefact),
            )
            if artefact is not None
        ]
        method = (
            "by the classifier, trained on labels"
            if parts.classifier is not None
            else "predicted with prompts (zero-shot), without training on labels"
        )
        facts = {
            "Model": f"{self._settings.checkpoint}: {', '.join(artefacts)}",
            "Findings": f"{len(self.model.findings)}, {method}",
            "Model input": f"{' × '.join(map(str, spec.shape))} voxels of {' × '.join(f'{s:g}' for s in spec.spacing)} mm "
            f"(slices, rows, columns) around the centre of the scan, {spec.window[0]:g} to {spec.window[1]:g} HU",
            "Draft report": "by the run's report decoder" if self.model.writes_reports else "none: no report decoder",
            "X-ray index": why_not if nearest is None else f"{nearest.folder}, {len(nearest.store):,} X-rays",
            "Computed on": device,
        }
        if parts.expert is not None and parts.classifier is None:
            facts["Where"] = "the projection prior's contribution to a probability has no position in the scan"
        return facts

    def read(self, scan: Volume, tell: Tell) -> Answer:
        """See `Reader`."""
        tell("encoding")
        prediction = self.model.predict_volume(
            scan,
            saliency=self.model.findings,
            report=self.model.writes_reports,
            before_saliency=lambda: tell("saliency"),
        )
        findings = [
            FindingAnswer(
                name, value, SaliencyMap(prediction.saliency[name].values, prediction.saliency[name].affine_lps)
            )
            for name, value in prediction.probabilities.items()
        ]
        neighbours = None if self.nearest is None else self.nearest.find(self.model, prediction)
        return Answer(findings, prediction.report, neighbours, self._notes(scan))

    def _notes(self, scan: Volume) -> list[str]:
        notes = []
        if float(scan.voxels.min()) > _LUNG_HU:
            notes.append("No voxel of this scan is as dark as lung. Is it a chest CT in HU?")
        spec = self.model.volume_spec
        seen = np.array(spec.shape) * np.array(spec.spacing)
        size = (np.abs(scan.affine_lps[:3, :3]) @ np.array(scan.voxels.shape))[::-1]  # along z, y, x
        if (size > seen * _MARGIN).any():
            sizes = [" × ".join(f"{mm:.0f}" for mm in box) for box in (size, seen)]
            notes.append(
                f"The scan ({sizes[0]} mm) is larger than the model's input ({sizes[1]} mm; slices, rows, columns). The "
                "model does not use its edges."
            )
        return notes
