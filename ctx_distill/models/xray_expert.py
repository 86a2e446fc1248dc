"""The frozen X-ray expert: an image tower, an optional text tower, and its preprocessing."""

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
    """A pretrained radiograph model used as a teacher, always frozen and in eval mode.

    Attributes:
        name: name of the folder or repository.
        kind: library of the model: open_clip, torchxrayvision or transformers.
        embed_dim: D_e, width of the image embedding.
        text_dim: D_t, width of the text embedding; None without a text tower.
        logit_scale: the expert's 1 / temperature; None if it was not trained contrastively.
        license: license according to its model card, or "unknown".
        revision: commit of its repository, if known.
        source: folder or repository from which it was opened.
        preprocessing: preprocessing of radiographs.
        text_tower: the text tower, or None.
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
        """Initialise the common attributes.

        Args:
            folder: folder of its files.
            embed_dim: D_e.
            preprocessing: preprocessing of radiographs.
            config: architecture as JSON values; part of the fingerprint, so it must not contain paths.
            weights_sha256: SHA-256 over the weight files.
            text_tower: the text tower, or None.
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
        """Whether texts and images share an embedding space: contrastively trained towers of equal width."""
        return self.text_dim == self.embed_dim and self.logit_scale is not None

    def freeze(self) -> None:
        """Freeze all parameters and switch to eval mode."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> XrayExpert:
        """Stay in eval mode regardless of `mode`."""
        del mode
        super().train(False)
        return self

    @abstractmethod
    def image_features(self, pixels: Tensor) -> Tensor:
        """Return unnormalised features (B, D_e) of preprocessed radiographs (B, C, h, w)."""

    def preprocess(self, image: NDArray[np.float32]) -> Tensor:
        """Convert a radiograph (H, W) in [0, 1], bone bright, to the tower's input (C, h, w)."""
        return self.preprocessing.apply(torch.as_tensor(image, dtype=torch.float32)[None])[0]

    def preprocess_batch(self, images: Tensor) -> Tensor:
        """Convert radiographs of equal size (B, H, W) in [0, 1] on any device to (B, C, h, w)."""
        return self.preprocessing.apply(images)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return L2-normalised features (B, D_e) of preprocessed radiographs (B, C, h, w)."""
        expected = (self.preprocessing.channels, *self.preprocessing.size)
        if tuple(pixels.shape[1:]) != expected:
            raise InputError(
                f"expert {self.name}: radiographs of shape {tuple(pixels.shape[1:])}; expected {expected}."
                " Prepare them with this expert's preprocess()."
            )
        # the frozen expert keeps its dtype regardless of the training precision
        pixels = pixels.to(next(self.parameters()).dtype)
        return F.normalize(self.image_features(pixels).float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Return L2-normalised features (B, D_t); texts longer than the context are split by sentences and averaged.

        Raises:
            InputError: the expert has no text tower.
        """
        if self.text_tower is None:
            raise InputError(
                f"expert {self.name} ({self.kind}) has no text tower to embed texts. Choose an"
                " expert with one (open_clip, SigLIP), or set a separate report encoder for the keys of the index."
            )
        return F.normalize(self.text_tower.encode_reports(texts, batch_size), dim=-1)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) over architecture, weights, preprocessing and tokenizer, independent of location."""
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
        """Return facts about the expert as JSON values."""
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
