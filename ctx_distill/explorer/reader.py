"""The model behind the explorer: a stage-3 artefact asked with prompts, its report decoder, and the X-ray index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctx_distill.checkpoint import ARTEFACT_FILE
from ctx_distill.data.projection import square_projection
from ctx_distill.data.transforms import VolumeSpec, prepare_volume, target_affine
from ctx_distill.data.volume import Volume
from ctx_distill.errors import InputError
from ctx_distill.explorer.answers import About, Answer, FindingAnswer, Saliency, Tell
from ctx_distill.explorer.nearest import NearestXrays
from ctx_distill.models.dual_encoder import DualEncoder
from ctx_distill.models.report_decoder import ReportDecoder
from ctx_distill.tasks.distillation_targets import embed_projection
from ctx_distill.tasks.prior import open_prior
from ctx_distill.tasks.prompting import pair_probabilities, prompt_features
from ctx_distill.text.findings import load_vocabulary
from ctx_distill.types import CTBatch

# A map is smoothed over about this many mm: single voxels' gradients are noise.
_SMOOTH_MM = 20.0


@dataclass(frozen=True)
class ReaderSettings:
    """Attributes:
    checkpoint: a run folder, or the folder of its stage-3 artefact.
    index: the folder of a stage-1 artefact; None: no X-rays are looked up.
    show_reports: whether reports and pictures of the pool are shown.
    vocabulary: findings to ask for.
    neighbours: X-rays shown.
    device: cpu, cuda, or auto.
    threads: of the CPU; None: torch's own.
    """

    checkpoint: Path
    index: Path | None = None
    show_reports: bool = False
    vocabulary: str = "ct-rate"
    neighbours: int = 6
    device: str = "auto"
    threads: int | None = None


def open_reader(settings: ReaderSettings) -> ModelReader:
    """The opener of `serve`.

    Raises:
        InputError: the checkpoint or the index is missing, damaged, or they do not belong together.
    """
    return ModelReader(settings)


class ModelReader:
    """See `Reader`."""

    def __init__(self, settings: ReaderSettings) -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        wanted = settings.device
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(wanted)
        folder = _stage_3(settings.checkpoint)
        model, self.artefact = DualEncoder.load(folder)
        self.model = model.to(self.device).requires_grad_(False)
        self.spec = VolumeSpec.from_config(self.artefact.config["volume_spec"])
        self.prior = open_prior(self.artefact, self.model.embed_dim)
        if self.prior is not None:
            self.prior.expert.to(self.device)
        self.names = load_vocabulary(settings.vocabulary).names
        positive, negative = prompt_features(self.model.encode_text, self.names, "normal")
        self.positive, self.negative = positive.to(self.device), negative.to(self.device)
        self.scale = float(self.model.logit_scale.exp())
        self.decoder = self._open_decoder(folder)
        self.nearest = None if settings.index is None else NearestXrays(settings, self.model, self.artefact)
        self.about = self._about(settings, folder)

    def _open_decoder(self, folder: Path) -> ReportDecoder | None:
        place = folder.parent.parent / "report" / folder.name
        if not (place / ARTEFACT_FILE).is_file():
            return None
        decoder, artefact = ReportDecoder.load(place)
        # One of another model beside it is no reason not to start.
        return decoder.to(self.device) if artefact.upstream.get("dual-encoder") == self.artefact.fingerprint else None

    def _about(self, settings: ReaderSettings, folder: Path) -> About:
        facts = {
            "Model": f"{folder}, {self.artefact.fingerprint[:12]}",
            "Findings": f"asked with sentences ({settings.vocabulary}, {len(self.names)}); none of their labels was trained on",
            "The model sees": f"{' × '.join(map(str, self.spec.shape))} voxels of "
            f"{' × '.join(f'{s:g}' for s in self.spec.spacing)} mm (slices, rows, columns), "
            f"{self.spec.window[0]:g} to {self.spec.window[1]:g} HU, from the middle of the scan",
            "Where": "gradient × input of the CT encoder, smoothed"
            + ("; the part of a value that comes from the scan's projection has no place in it" if self.prior else ""),
            "Draft report": "by the decoder of the same run" if self.decoder else "none: the run has no report decoder",
            "Computed on": str(self.device),
        }
        if self.nearest is not None:
            facts["X-ray index"] = f"{settings.index}, {len(self.nearest.store):,} X-rays"
        return About(facts, nearest="" if self.nearest is None else self.nearest.told, shows_pool=settings.show_reports)

    def __call__(self, scan: Volume, tell: Tell) -> Answer:
        """See `Reader`."""
        tell("encoding")
        volume = prepare_volume(scan, self.spec)[None].to(self.device)
        with torch.no_grad():
            prior = self._prior(scan, volume)
            image, output = self.model.encode_volume(volume, prior)
            values = pair_probabilities(image, self.positive, self.negative, self.scale)[0].tolist()
            tokens = output.tokens
        report = None if self.decoder is None else self.decoder.generate(tokens, no_repeat_ngram_size=3)[0]
        neighbours = None if self.nearest is None else self.nearest(image[0])
        tell("saliency")
        affine = target_affine(scan, self.spec)
        maps = self._maps(volume, prior)
        findings = [
            FindingAnswer(name, value, Saliency(one, affine))
            for name, value, one in zip(self.names, values, maps, strict=True)
        ]
        return Answer(findings, report, neighbours, self._notes(scan))

    def _prior(self, scan: Volume, volume: Tensor) -> Tensor | None:
        if self.prior is None:
            return None
        one = torch.zeros(1, dtype=torch.int64)
        batch = CTBatch(volume, one, one, [""], projection=square_projection(scan)[None].to(self.device))
        return embed_projection(batch, self.prior.expert)

    def _maps(self, volume: Tensor, prior: Tensor | None) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """Of each finding, |gradient of its logit x (voxel - air)|, smoothed: (D, H, W)."""
        given = volume.clone().requires_grad_(True)
        with torch.enable_grad():
            image = self.model.encode_volume(given, prior)[0]
            logits = self.scale * (image @ (self.positive - self.negative).T)[0]
            above_air = volume - self.spec.output_range[0]
            sizes = [max(1, 2 * round(_SMOOTH_MM / step / 2) + 1) for step in self.spec.spacing]
            maps = []
            for number in range(len(self.names)):
                (gradient,) = torch.autograd.grad(logits[number], given, retain_graph=number + 1 < len(self.names))
                raw = (gradient * above_air).abs()
                smooth = F.avg_pool3d(
                    raw, sizes, stride=1, padding=[size // 2 for size in sizes], count_include_pad=False
                )
                maps.append(smooth[0, 0].float().cpu().numpy())
        return maps

    def _notes(self, scan: Volume) -> list[str]:
        notes = []
        if float(scan.voxels.min()) > -500:
            notes.append("Nothing in this scan is as dark as lung; is it a chest CT in HU?")
        covered = np.array(self.spec.shape) * np.array(self.spec.spacing)
        size = np.abs(scan.affine_lps[:3, :3]) @ np.array(scan.voxels.shape)  # x, y, z
        if (size[::-1] > covered * 1.05).any():
            notes.append(
                f"The scan is larger ({' × '.join(f'{s:.0f}' for s in size[::-1])} mm) than what the model sees "
                f"({' × '.join(f'{c:.0f}' for c in covered)} mm); its edges are left out."
            )
        return notes


def _stage_3(checkpoint: Path) -> Path:
    for place in (checkpoint, checkpoint / "align" / "artefact", checkpoint / "artefact"):
        if (place / ARTEFACT_FILE).is_file():
            return place
    raise InputError(
        f"{checkpoint}: holds no model; expected a run folder with align/artefact, or that folder itself. Run make stage-3."
    )
