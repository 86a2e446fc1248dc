"""A trained model that runs on scans as they are on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ctx_distill.data.io.scan_file import ScanFile
from ctx_distill.data.io.volume import Volume
from ctx_distill.data.transforms.model_volume import VolumeSpec, prepare_volume, target_affine
from ctx_distill.data.transforms.projection import square_projection
from ctx_distill.errors import InputError
from ctx_distill.files import hash_json
from ctx_distill.inference.parts import Parts, open_parts
from ctx_distill.inference.prediction import Neighbour, Prediction, Saliency, ScanGrid
from ctx_distill.inference.saliency import saliency_maps
from ctx_distill.models.ct_encoder import CTEncoder
from ctx_distill.stages.shared.prompt_scores import prompt_features

PathLike = str | Path


class CTModel:
    """Findings, embedding, saliency and draft report of chest CTs. A research tool, not a medical device.

    `ctx_distill.load` opens one. It computes on the CPU until moved with `to`.

    Attributes:
        parts: the opened parts.
        notice: to be shown with every result.
    """

    notice = "A research tool, not a medical device."

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._device = torch.device("cpu")

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> CTModel:
        """Open an export from a folder, or from the hub at a pinned commit; only JSON and safetensors are fetched.

        Args:
            source: folder, or `hf-hub:organisation/name`.
            revision: full commit hash; required for the hub.

        Raises:
            InputError: the source is not pinned, cannot be reached, or holds no model.
        """
        from ctx_distill.models.weights import resolve_source

        return cls(open_parts(resolve_source(str(source), revision)))

    def to(self, device: str | torch.device) -> CTModel:
        """Move the model to a device; return the model."""
        self._device = torch.device(device)
        parts = self.parts
        own: list[nn.Module | None] = [parts.dual, parts.expert]
        own += [parts.classifier.head, parts.classifier.encoder] if parts.classifier is not None else []
        own += [parts.decoder.model] if parts.decoder is not None else []
        for module in own:
            if module is not None:
                module.to(self._device)
        self.__dict__.pop("_prompts", None)
        return self

    @property
    def findings(self) -> tuple[str, ...]:
        """Return the findings of `Prediction.probabilities`."""
        return self.parts.asked.findings if self.parts.classifier is None else self.parts.classifier.findings

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the fingerprints of its parts and of the zero-shot query."""
        parts = self.parts
        used = [] if parts.dual_artefact is None else [parts.dual_artefact.fingerprint]
        used += [one.artefact.fingerprint for one in (parts.classifier, parts.decoder) if one is not None]
        return hash_json([used, asdict(parts.asked)])

    @property
    def encoder_fingerprint(self) -> str:
        """Return the fingerprint of the artefact whose encoder `pooled` runs."""
        classifier, dual = self.parts.classifier, self.parts.dual_artefact
        artefact = dual if dual is not None else classifier.artefact if classifier is not None else None
        assert artefact is not None
        return artefact.fingerprint

    @torch.no_grad()
    def pooled(self, scan: Volume) -> NDArray[np.float32]:
        """Return the CT encoder's feature of a scan, (D_c,), on which linear probes are fitted."""
        dual, classifier = self.parts.dual, self.parts.classifier
        encoder = dual.ct_encoder if dual is not None else classifier.encoder if classifier is not None else None
        assert encoder is not None
        volume = prepare_volume(scan, self.parts.spec)[None].to(self._device)
        feature: NDArray[np.float32] = encoder(volume).pooled[0].float().cpu().numpy()
        return feature

    @property
    def volume_spec(self) -> VolumeSpec:
        """Return the volume spec to which scans are resampled."""
        return self.parts.spec

    @property
    def writes_reports(self) -> bool:
        """Return whether there is a report decoder."""
        return self.parts.decoder is not None

    def saliency_names(self, asked: bool | Sequence[str]) -> tuple[str, ...]:
        """Return the findings that `saliency` of `predict` names; raise `InputError` if one is not in `findings`."""
        names = (self.findings if asked else ()) if isinstance(asked, bool) else tuple(asked)
        unknown = [name for name in names if name not in self.findings]
        if unknown:
            raise InputError(
                f"saliency of {unknown[0]!r}: not a finding of this model; choose from: {', '.join(self.findings)}"
            )
        return names

    @overload
    def predict(  # type: ignore[overload-overlap]  # a str is an Iterable[str] too; the first overload takes it
        self, paths: PathLike, *, saliency: bool | Sequence[str] = ..., report: bool = ...
    ) -> Prediction: ...

    @overload
    def predict(
        self, paths: Iterable[PathLike], *, saliency: bool | Sequence[str] = ..., report: bool = ...
    ) -> list[Prediction]: ...

    def predict(
        self,
        paths: PathLike | Iterable[PathLike],
        *,
        saliency: bool | Sequence[str] = False,
        report: bool = False,
    ) -> Prediction | list[Prediction]:
        """Predict findings, embedding, saliency and report of scans.

        Args:
            paths: a NIfTI, NRRD, MHA, MHD or npz file, or a folder of DICOM slices; or several.
            saliency: findings to compute maps of; True for all of `findings`.
            report: also draft a report.

        Returns:
            A prediction, or a list in the order of several paths.

        Raises:
            InputError: a scan cannot be read (see `read_volume`), a finding is unknown, or a report is requested of a model
                without a decoder.
        """
        names = self.saliency_names(saliency)
        if report and self.parts.decoder is None:
            raise InputError(
                f"{self.parts.source}: report=True needs a report decoder, and this model has none. Run the report stage."
            )
        if isinstance(paths, str | Path):
            return self.predict_volume(ScanFile(Path(paths)).read(), saliency=names, report=report)
        return [self.predict_volume(ScanFile(Path(p)).read(), saliency=names, report=report) for p in paths]

    @torch.no_grad()
    def predict_volume(
        self,
        scan: Volume,
        *,
        saliency: Sequence[str] = (),
        report: bool = False,
        before_saliency: Callable[[], object] = lambda: None,
    ) -> Prediction:
        """Predict a scan that is already read; `before_saliency` is called before the maps are computed."""
        parts = self.parts
        volume = prepare_volume(scan, parts.spec)[None].to(self._device)
        grid = ScanGrid(_triple(scan.voxels.shape), scan.affine_lps)
        prior = None if parts.expert is None else self._prior(scan)
        zero_shot: dict[str, float] = {}
        tokens = None
        if parts.dual is not None:
            features, output = parts.dual.encode_volume(volume, prior)
            zero_shot = _named(parts.asked.findings, self._zero_shot_logits(features).sigmoid())
            embedding, tokens, pooled = features[0], output.tokens, output.pooled
        if parts.classifier is not None and parts.classifier.encoder is not None:
            pooled = parts.classifier.encoder(volume).pooled
            if parts.dual is None:
                embedding = pooled[0]
        probabilities = zero_shot
        if parts.classifier is not None:
            probabilities = _named(parts.classifier.findings, parts.classifier.head(pooled).sigmoid())
        text = None
        if report and parts.decoder is not None:
            assert tokens is not None
            decoder = parts.decoder
            (text,) = decoder.model.generate(
                tokens, decoder.max_length, decoder.beams, decoder.no_repeat, decoder.min_length, decoder.length_penalty
            )
        before_saliency()
        return Prediction(
            path=scan.path,
            probabilities=probabilities,
            asked="zero-shot" if parts.classifier is None else "classifier",
            zero_shot=zero_shot,
            embedding=embedding.float().cpu().numpy(),
            scan=grid,
            saliency=self._saliency(scan, volume, prior, saliency, grid) if saliency else {},
            report=text,
        )

    def nearest(self, prediction: Prediction, k: int = 5) -> list[Neighbour]:
        """Return the radiographs of the index nearest to a scan, by the cosine of image embeddings.

        Args:
            prediction: what `predict` returned.
            k: largest number of radiographs.

        Raises:
            InputError: there is no index, or its embeddings have another dimension.
        """
        items, values = self._pool
        if values.shape[1] != len(prediction.embedding):
            raise InputError(
                f"{self.parts.index}: image embeddings have {values.shape[1]} dimensions, that of the model has"
                f" {len(prediction.embedding)}. Give the index that stage 2 was trained with."
            )
        similarity = values @ F.normalize(torch.from_numpy(prediction.embedding), dim=0)
        best = similarity.topk(min(k, len(similarity)))
        rows = [(items.iloc[place], value) for value, place in zip(best.values.tolist(), best.indices.tolist())]
        return [
            Neighbour(str(row["study_id"]), str(row["image_id"]), value, str(row.get("report", "")))
            for row, value in rows
        ]

    @cached_property
    def _pool(self) -> tuple[Any, Tensor]:
        from ctx_distill.retrieval.store import XrayIndexArtefact

        if self.parts.index is None:
            raise InputError(f"{self.parts.source}: no X-ray index. Give one: ctx_distill.load(path, index=FOLDER).")
        artefact = XrayIndexArtefact.open(self.parts.index, device="cpu")
        return artefact.items, F.normalize(artefact.features.float(), dim=-1)

    def _prior(self, scan: Volume) -> Tensor:
        expert = self.parts.expert
        assert expert is not None
        picture = square_projection(scan)[None].to(self._device)
        return F.normalize(expert.encode_image(expert.preprocess_batch(picture)), dim=-1)

    @cached_property
    def _prompts(self) -> tuple[Tensor, Tensor]:
        dual, asked = self.parts.dual, self.parts.asked
        assert dual is not None
        return prompt_features(dual.encode_text, list(asked.findings), asked.templates, asked.synonyms)

    def _zero_shot_logits(self, features: Tensor) -> Tensor:
        """Return log odds (B, F) of unit rows (B, D)."""
        assert self.parts.dual is not None
        positive, negative = self._prompts
        return self.parts.dual.logit_scale.exp() * (features @ (positive - negative).to(features).T)

    def _head(self, prior: Tensor | None) -> tuple[CTEncoder, Callable[[Tensor], Tensor]]:
        """Return the encoder behind `probabilities`, and the function from its pooled feature to log odds."""
        dual, classifier = self.parts.dual, self.parts.classifier
        if classifier is not None:
            encoder = classifier.encoder if classifier.encoder is not None else dual.ct_encoder if dual else None
            assert encoder is not None
            return encoder, classifier.head
        assert dual is not None
        model = dual

        def ask(pooled: Tensor) -> Tensor:
            own = F.normalize(model.image_projection(pooled), dim=-1)
            return self._zero_shot_logits(model.join_prior(own, prior))

        return model.ct_encoder, ask

    def _saliency(
        self, scan: Volume, volume: Tensor, prior: Tensor | None, names: Sequence[str], grid: ScanGrid
    ) -> dict[str, Saliency]:
        encoder, ask = self._head(prior)
        columns = [self.findings.index(name) for name in names]
        method, maps = saliency_maps(encoder, volume, ask, columns, self.parts.spec.output_range[0])
        affine = target_affine(scan, self.parts.spec)
        return {name: Saliency(name, values, affine, grid, method) for name, values in zip(names, maps, strict=True)}


def _named(names: Sequence[str], row: Tensor) -> dict[str, float]:
    return dict(zip(names, (float(p) for p in row[0].cpu()), strict=True))


def _triple(shape: tuple[int, ...]) -> tuple[int, int, int]:
    a, b, c = shape
    return int(a), int(b), int(c)
