"""The frozen X-ray expert: an image tower, a text tower where it has one, and how its input is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctx_distill.files import hash_json
from ctx_distill.models.text_tower import tokenizer_hash
from ctx_distill.models.weights import read_provenance
from ctx_distill.types import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ctx_distill.models.preprocessing import ImagePreprocessing
    from ctx_distill.models.text_tower import TextTower


class XrayExpert(nn.Module, ABC):
    """A pretrained radiograph model that teaches: no gradient reaches its weights and it stays in eval mode.

    Attributes:
        name: the folder's or repository's name.
        kind: library that it comes from: open_clip, torchxrayvision or transformers.
        embed_dim: D_e, width of the image embedding.
        text_dim: D_t, width of the text embedding; None without a text tower.
        logit_scale: the expert's own 1 / temperature; None where it was not trained contrastively.
        license: as its model card says, or "unknown".
        revision: commit of the repository that it came from, where known.
        source: where it was opened from.
        preprocessing: how a radiograph becomes its input.
        text_tower: its text tower, or None.
        weights_sha256: SHA-256 over its weight files.
    """

    kind: str

    def __init__(
        self,
        folder: Path,
        embed_dim: int,
        preprocessing: ImagePreprocessing,
        config: dict[str, Any],
        weights_sha256: str,
        text_tower: TextTower | None = None,
        logit_scale: float | None = None,
    ) -> None:
        """Keep what every expert declares.

        Args:
            folder: where its files lie.
            embed_dim: D_e.
            preprocessing: how a radiograph becomes its input.
            config: architecture, as plain JSON; goes into the fingerprint and must not name places on disk.
            weights_sha256: SHA-256 over the weight files.
            text_tower: its text tower.
            logit_scale: exponentiated.
        """
        super().__init__()
        provenance = read_provenance(folder)
        self.name = provenance.name
        self.license = provenance.license
        self.revision = provenance.revision
        self.source = provenance.source
        self.embed_dim = embed_dim
        self.preprocessing = preprocessing
        self.weights_sha256 = weights_sha256
        self.logit_scale = logit_scale
        self.text_tower = text_tower
        self.text_dim = text_tower.output_dim if text_tower is not None else None
        self._config = config
        self._tokenizer_hash = tokenizer_hash(text_tower.tokenizer) if text_tower is not None else None

    @property
    def has_text(self) -> bool:
        """Whether there is a text tower."""
        return self.text_tower is not None

    @property
    def has_joint_space(self) -> bool:
        """Whether its texts lie in the space of its images: towers of one width, trained against each other."""
        return self.text_dim == self.embed_dim and self.logit_scale is not None

    def freeze(self) -> None:
        """Take all parameters out of training and go to eval mode."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> XrayExpert:
        """Stay in eval mode, whatever is asked."""
        del mode
        super().train(False)
        return self

    @abstractmethod
    def image_features(self, pixels: Tensor) -> Tensor:
        """(B, D_e) of preprocessed radiographs (B, C, h, w), not normalised."""

    def preprocess(self, image: NDArray[np.float32]) -> Tensor:
        """One radiograph (H, W) in [0, 1], bone bright, to the tower's input (C, h, w)."""
        return self.preprocessing.apply(torch.as_tensor(image, dtype=torch.float32)[None])[0]

    def preprocess_batch(self, images: Tensor) -> Tensor:
        """Radiographs of one size (B, H, W) in [0, 1] on any device to (B, C, h, w)."""
        return self.preprocessing.apply(images)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, D_e), L2-normalised, of preprocessed radiographs (B, C, h, w)."""
        expected = (self.preprocessing.channels, *self.preprocessing.size)
        if tuple(pixels.shape[1:]) != expected:
            raise InputError(
                f"expert {self.name}: radiographs of shape {tuple(pixels.shape[1:])}, expected {expected}."
                " Prepare them with this expert's preprocess()."
            )
        # the frozen expert keeps its type, whatever precision a stage trains in
        pixels = pixels.to(next(self.parameters()).dtype)
        return F.normalize(self.image_features(pixels).float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """(B, D_t), L2-normalised. A text longer than the context is split between sentences and averaged.

        Raises:
            InputError: the expert has no text tower.
        """
        if self.text_tower is None:
            raise InputError(
                f"expert {self.name} ({self.kind}) has no text tower, so texts cannot be embedded with it. Choose an"
                " expert with one (open_clip, SigLIP), or give a separate report encoder for the keys of the index."
            )
        return F.normalize(self.text_tower.encode_reports(texts, batch_size), dim=-1)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over architecture, weights, preprocessing and tokenizer; equal wherever the files lie."""
        return hash_json(
            {
                "kind": self.kind,
                "config": self._config,
                "weights": self.weights_sha256,
                "preprocessing": self.preprocessing.describe(),
                "tokenizer": self._tokenizer_hash,
            }
        )

    def describe(self) -> dict[str, Any]:
        """What is worth writing down, as plain JSON values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "source": self.source,
            "revision": self.revision,
            "license": self.license,
            "fingerprint": self.fingerprint(),
            "weights_sha256": self.weights_sha256,
            "embed_dim": self.embed_dim,
            "text_dim": self.text_dim,
            "logit_scale": self.logit_scale,
            "preprocessing": self.preprocessing.describe(),
            "tokenizer": self._tokenizer_hash,
        }
