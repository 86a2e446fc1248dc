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
    """Embed CT and report in one space: image_features = norm(P_a f(V)), text_features = norm(P_t E(r)).

    With a projection prior (**ours**), image_features = norm(norm(P_a f(V)) + w u'), where u' is the expert's feature of
    the CT's frontal projection.

    Attributes:
        ct_encoder: f.
        text_encoder: E.
        image_projection: P_a, D_c -> D.
        text_projection: P_t, D_t -> D, or the identity.
        logit_scale: log of 1 / temperature, learnt (Radford et al. 2021).
        embed_dim: D.
        prior_weight: w; 0 without a projection prior.
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
        """Combine two encoders.

        Args:
            ct_encoder: f.
            text_encoder: E.
            projection_dim: D; None uses the text space (D = D_t, no text projection), as needed for a frozen text tower of
                the expert.
            image_projection: initial P_a (such as P_d of stage 2); None for a new linear projection.
            init_logit_scale: initial 1 / temperature.
            prior_weight: w.

        Raises:
            InputError: image_projection does not map D_c to D.
        """
        super().__init__()
        self.embed_dim = projection_dim or text_encoder.embed_dim
        self.ct_encoder = ct_encoder
        self.text_encoder = text_encoder
        self.image_projection = image_projection or ProjectionHead(ct_encoder.embed_dim, self.embed_dim)
        shape = (self.image_projection.config["in_dim"], self.image_projection.config["out_dim"])
        if shape != (ct_encoder.embed_dim, self.embed_dim):
            raise InputError(
                f"dual encoder: the image projection maps {shape[0]} to {shape[1]}; expected"
                f" {ct_encoder.embed_dim} to {self.embed_dim}. Use a new projection, or set projection_dim"
                f" to {shape[1]}."
            )
        self.prior_weight = prior_weight
        self.text_projection: nn.Module = (
            nn.Identity() if projection_dim is None else nn.Linear(text_encoder.embed_dim, projection_dim, bias=False)
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))

    def encode_volume(self, volume: Tensor, prior: Tensor | None = None) -> tuple[Tensor, EncoderOutput]:
        """Return L2-normalised image features (B, D) and the output of the CT encoder.

        Args:
            volume: (B, 1, D, H, W).
            prior: (B, D) unit rows, if the model has a projection prior.

        Raises:
            InputError: the model has a projection prior, but `prior` is None.
        """
        features, output = self.encode_alone(volume)
        return self.join_prior(features, prior), output

    def encode_alone(self, volume: Tensor) -> tuple[Tensor, EncoderOutput]:
        """Return norm(P_a f(V)) (B, D), the image features without prior, and the output of the CT encoder."""
        output = self.ct_encoder(volume)
        return F.normalize(self.image_projection(output.pooled), dim=-1), output

    def join_prior(self, features: Tensor, prior: Tensor | None) -> Tensor:
        """Combine the features of `encode_alone` (B, D) and the prior (B, D) into unit rows (B, D)."""
        if not self.prior_weight:
            return features
        if prior is None:
            raise InputError(
                "this model has a projection prior, but the batch has no projections."
                " Set data.init_args.projection=true."
            )
        return F.normalize(features + self.prior_weight * prior.to(features), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Return L2-normalised text features (B, D)."""
        return F.normalize(self.text_projection(self.text_encoder(texts)), dim=-1)

    def save(
        self,
        folder: Path,
        upstream: Mapping[str, str],
        volume_spec: Mapping[str, Any],
        prior_expert: Path | None = None,
    ) -> Artefact:
        """Write the self-contained artefact `dual-encoder`.

        Args:
            folder: artefact folder.
            upstream: fingerprints of the inputs.
            volume_spec: configuration of the volume spec, to prepare volumes in the same way.
            prior_expert: folder of the expert for the projection prior, copied into the artefact.
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
        """Load a `dual-encoder` artefact in eval mode.

        Raises:
            InputError: the artefact is missing, of another kind, or its weights do not fit.
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
        folder: artefact folder.
        encoder: f.
        projection: P_d, D_c -> D_e.
        upstream: fingerprints of the inputs.
        volume_spec: configuration of the volume spec.
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
    """Load a `ct-encoder` artefact (encoder and P_d) in eval mode.

    Raises:
        InputError: the artefact is missing, of another kind, or its weights do not fit.
    """
    artefact = read_artefact(folder, "ct-encoder")
    encoder = build_ct_encoder(artefact.config["ct_encoder"])
    projection = ProjectionHead(**artefact.config["projection"])
    tensors = artefact.weights()
    load_weights(encoder, tensors, "encoder.", str(folder))
    load_weights(projection, tensors, "projection.", str(folder))
    return encoder.eval(), projection.eval(), artefact
