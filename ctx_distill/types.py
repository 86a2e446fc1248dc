"""Batches and outputs, shared by every part.

Shapes: B batch, C channel, D H W depth (inferior to superior), rows (anterior to posterior), columns (patient's
right to left), F findings, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Self, TypeGuard

from torch import Tensor

from ctx_distill.errors import InputError

__all__ = ["CTBatch", "EncoderOutput", "InputError", "XrayBatch"]


class _PinnedTensors:
    """A batch whose tensors `DataLoader(pin_memory=True)` can pin, so that copies to a GPU do not wait."""

    def pin_memory(self) -> Self:
        """The batch with its tensors in page-locked memory; a tensor that holds no data yet (device meta) stays as it is."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}  # type: ignore[arg-type]
        pinned = {name: value.pin_memory() for name, value in values.items() if _has_data(value)}
        return replace(self, **pinned)  # type: ignore[type-var]


def _has_data(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and not value.is_meta


@dataclass
class CTBatch(_PinnedTensors):
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
class XrayBatch(_PinnedTensors):
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
