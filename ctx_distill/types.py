"""Batches and outputs, shared by every part.

Shapes: B batch, C channel, D H W depth (inferior to superior), rows (anterior to posterior), columns (patient's
right to left), F findings, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ctx_distill.errors import InputError

__all__ = ["CTBatch", "EncoderOutput", "InputError", "XrayBatch"]


@dataclass
class CTBatch:
    """CT volumes of one batch with the texts of their studies.

    Attributes:
        volume: (B, 1, D, H, W) float32, scaled to the volume spec's output range.
        study: (B,) int64, an integer a study: equal numbers are images of one study.
        row: (B,) int64, the row of the manifest (its whole frame) that each item came from.
        report: B report texts (findings and impression joined; "" where a study has none).
        labels: (B, F) float32 holding 1, 0, -1 (uncertain) or NaN (blank); None where the task must not see labels.
        projection: (B, H, W) float32 in [0, 1], each scan's own frontal digital radiograph, bone bright; None where the
            data module was not asked for it.
        unreadable: rows that others were read in place of, and why; `data.set_aside` counts them.
    """

    volume: Tensor
    study: Tensor
    row: Tensor
    report: list[str]
    labels: Tensor | None = None
    projection: Tensor | None = None
    unreadable: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class XrayBatch:
    """Radiographs of one batch, preprocessed for one X-ray expert.

    Attributes:
        image: (B, C, H, W) float32, as the expert's `preprocess` gives it.
        study: (B,) int64, an integer a study.
        row: (B,) int64, the manifest row.
        report: B report texts.
        unreadable: as `CTBatch`.
    """

    image: Tensor
    study: Tensor
    row: Tensor
    report: list[str]
    unreadable: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class EncoderOutput:
    """What a CT encoder gives.

    Attributes:
        pooled: (B, D_c), one vector a volume.
        tokens: (B, T, D_c), the token grid flattened in D, H, W order.
    """

    pooled: Tensor
    tokens: Tensor
