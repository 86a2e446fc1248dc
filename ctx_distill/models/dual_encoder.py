"""The dual encoder of stage 3, the CT encoder of stage 2, and their artefacts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctx_distill.checkpoint import Artefact, load_weights, read_artefact, write_artefact
from ctx_distill.models.ct_encoder import CTEncoder, build_ct_encoder
from ctx_distill.models.heads import ProjectionHead
from ctx_distill.models.text_encoder import TextEncoder, load_text_encoder
from ctx_distill.types import EncoderOutput, InputError

TEXT_FOLDER = "text_encoder"
PRIOR_FOLDER = "prior_expert"


class DualEncoder(nn.Module):
    """CT and report in one space: image_features = norm(P_a f(V)), text_features = norm(P_t E(r)).

    With a prior (**ours**), image_features = norm(norm(P_a f(V)) + w u'), u' the expert's feature of the CT's projection.

    Attributes:
        ct_encoder: f.
        text_encoder: E.
        image_projection: P_a, D_c -> D.
        text_projection: P_t, D_t -> D, or the identity.
        logit_scale: log of 1 / temperature, learnt (Radford et al. 2021).
        embed_dim: D.
        prior_weight: w; 0 without a prior.
    """

    def __init__(
        self,
        ct_encoder: CTEncoder,
        text_encoder: TextEncoder,
        projection_dim: int | None = None,
        image_projection: ProjectionHead | None = None,
        init_logit_scale: float = 1 / 0.07,
        prior_weight: float = 0.0,
    ) -> None:
        """Join two encoders.

        Args:
            ct_encoder: f.
            text_encoder: E.
            projection_dim: D; None keeps the text's own space (D = D_t, no text projection), which is what a frozen
                text tower of the expert needs.
            image_projection: P_a to start from (P_d of stage 2, say); None for a new linear one.
            init_logit_scale: 1 / temperature at the start.
            prior_weight: w.

        Raises:
            InputError: image_projection does not lead from D_c to D.
        """
        super().__init__()
        self.embed_dim = projection_dim or text_encoder.embed_dim
        self.ct_encoder = ct_encoder
        self.text_encoder = text_encoder
        self.image_projection = image_projection or ProjectionHead(ct_encoder.embed_dim, self.embed_dim)
        shape = (self.image_projection.config["in_dim"], self.image_projection.config["out_dim"])
        if shape != (ct_encoder.embed_dim, self.embed_dim):
            raise InputError(
                f"dual encoder: projection of the image from {shape[0]} to {shape[1]}, needed from"
                f" {ct_encoder.embed_dim} to {self.embed_dim}. Start with a new projection, or set projection_dim"
                f" to {shape[1]}."
            )
        self.prior_weight = prior_weight
        self.text_projection: nn.Module = (
            nn.Identity() if projection_dim is None else nn.Linear(text_encoder.embed_dim, projection_dim, bias=False)
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))

    def encode_volume(self, volume: Tensor, prior: Tensor | None = None) -> tuple[Tensor, EncoderOutput]:
        """Image features (B, D), L2-normalised, and the encoder's own output.

        Args:
            volume: (B, 1, D, H, W).
            prior: (B, D) unit rows, where the model has a prior.

        Raises:
            InputError: the model has a prior and none is given.
        """
        own, output = self.encode_alone(volume)
        return self.join_prior(own, prior), output

    def encode_alone(self, volume: Tensor) -> tuple[Tensor, EncoderOutput]:
        """norm(P_a f(V)) (B, D), the image features without a prior, and the encoder's own output."""
        output = self.ct_encoder(volume)
        return F.normalize(self.image_projection(output.pooled), dim=-1), output

    def join_prior(self, own: Tensor, prior: Tensor | None) -> Tensor:
        """Image features (B, D), unit rows, of `encode_alone`'s (B, D) and the prior's (B, D)."""
        if not self.prior_weight:
            return own
        if prior is None:
            raise InputError(
                "this model adds to what the X-ray expert says of the CT's own projection, and got no projections."
                " Set data.init_args.projection=true."
            )
        return F.normalize(own + self.prior_weight * prior.to(own), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Text features (B, D), L2-normalised."""
        return F.normalize(self.text_projection(self.text_encoder(texts)), dim=-1)

    def save(
        self,
        folder: Path,
        upstream: Mapping[str, str],
        volume_spec: Mapping[str, Any],
        prior_expert: Path | None = None,
    ) -> Artefact:
        """Write the artefact `dual-encoder`; it needs no other folder to be loaded.

        Args:
            folder: where.
            upstream: fingerprints of what it was made from.
            volume_spec: the volume spec's configuration, so that others prepare volumes alike.
            prior_expert: folder of the expert whose features are the prior; it is copied into the artefact.
        """
        config = {
            "ct_encoder": self.ct_encoder.config(),
            "text_encoder": self.text_encoder.config(),
            "image_projection": self.image_projection.config,
            "projection_dim": None if isinstance(self.text_projection, nn.Identity) else self.embed_dim,
            "volume_spec": dict(volume_spec),
            "prior_weight": self.prior_weight,
        }

        def write_parts(place: Path) -> None:
            (place / TEXT_FOLDER).mkdir()
            self.text_encoder.save_files(place / TEXT_FOLDER)
            if prior_expert is not None:
                shutil.copytree(prior_expert, place / PRIOR_FOLDER)

        return write_artefact(folder, "dual-encoder", config, self.state_dict(), upstream, extra=write_parts)

    @staticmethod
    def load(folder: Path) -> tuple[DualEncoder, Artefact]:
        """Read a `dual-encoder` artefact, in eval mode.

        Raises:
            InputError: it is missing, of another kind, or its weights do not fit.
        """
        artefact = read_artefact(folder, "dual-encoder")
        config = artefact.config
        model = DualEncoder(
            build_ct_encoder(config["ct_encoder"]),
            load_text_encoder(config["text_encoder"], folder / TEXT_FOLDER),
            config["projection_dim"],
            ProjectionHead(**config["image_projection"]),
            prior_weight=float(config["prior_weight"]),
        )
        load_weights(model, artefact.weights(), source=str(folder))
        return model.eval(), artefact


def save_ct_encoder(
    folder: Path,
    encoder: CTEncoder,
    projection: ProjectionHead,
    upstream: Mapping[str, str],
    volume_spec: Mapping[str, Any],
) -> Artefact:
    """Write the artefact `ct-encoder` of stage 2: the encoder and P_d.

    Args:
        folder: where.
        encoder: f.
        projection: P_d, D_c -> D_e.
        upstream: fingerprints of what it was made from.
        volume_spec: the volume spec's configuration.
    """
    config = {
        "ct_encoder": encoder.config(),
        "projection": projection.config,
        "volume_spec": dict(volume_spec),
    }
    tensors = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    tensors.update({f"projection.{key}": value for key, value in projection.state_dict().items()})
    return write_artefact(folder, "ct-encoder", config, tensors, upstream)


def load_ct_encoder(folder: Path) -> tuple[CTEncoder, ProjectionHead, Artefact]:
    """Read a `ct-encoder` artefact: the encoder and P_d, in eval mode.

    Raises:
        InputError: it is missing, of another kind, or its weights do not fit.
    """
    artefact = read_artefact(folder, "ct-encoder")
    encoder = build_ct_encoder(artefact.config["ct_encoder"])
    projection = ProjectionHead(**artefact.config["projection"])
    tensors = artefact.weights()
    load_weights(encoder, tensors, "encoder.", str(folder))
    load_weights(projection, tensors, "projection.", str(folder))
    return encoder.eval(), projection.eval(), artefact
