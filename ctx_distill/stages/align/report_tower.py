"""The report tower of stage 3: a copy of the expert's, a pretrained BERT, or a small one from scratch."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ctx_distill.data.manifests.manifest import Manifest
from ctx_distill.errors import InputError
from ctx_distill.models.text_encoder import BertTextEncoder, ExpertTextEncoder, TextEncoder
from ctx_distill.stages.shared.vocabulary_texts import vocabulary_texts


@dataclass(frozen=True)
class TextSettings:
    """Settings of the report tower.

    Attributes:
        tower: `expert`: a copy of the X-ray expert's text tower, whose space the student was distilled into; `bert`: any
            BERT-like folder or hub repository; `scratch`: a small BERT whose WordPiece vocabulary is trained on the
            manifest's `train` reports.
        trainable: Whether the tower is trained.
        lr_factor: Learning rate relative to that of the CT encoder.
        source: Folder or hub name of `bert`.
        revision: Pinned commit of a hub source.
        width: Width of `scratch`.
        layers: Layers of `scratch`.
        vocab_size: Vocabulary size of `scratch`.
        context_length: Context length of `bert` and `scratch`, in tokens.
        projection_dim: Width of the joint space; None uses the text tower's.
    """

    tower: Literal["expert", "bert", "scratch"] = "expert"
    trainable: bool = True
    lr_factor: float = 1.0
    source: str | None = None
    revision: str | None = None
    width: int = 128
    layers: int = 2
    vocab_size: int = 2000
    context_length: int = 256
    projection_dim: int | None = None


def build_report_tower(settings: TextSettings, expert: tuple[str, str | None], train: Manifest) -> TextEncoder:
    """Build the report tower.

    Args:
        settings: Settings of the tower.
        expert: Folder or hub name of the X-ray expert, and its revision.
        train: The training rows, whose reports the vocabulary of `scratch` is trained on.

    Raises:
        InputError: The source cannot be loaded, or `bert` has no source.
    """
    if settings.tower == "expert":
        return ExpertTextEncoder.from_expert(*expert, trainable=settings.trainable)
    if settings.tower == "bert":
        if settings.source is None:
            raise InputError(
                "stage 3: text.tower is bert, but text.source is not set. Set it to a folder or an hf-hub: repository."
            )
        return BertTextEncoder.from_pretrained(
            settings.source, settings.revision, settings.context_length, settings.trainable
        )
    reports = vocabulary_texts(train)
    with tempfile.TemporaryDirectory() as scratch:
        return BertTextEncoder.from_scratch(
            reports, Path(scratch), settings.vocab_size, settings.width, settings.layers, settings.context_length
        )
