"""Batches and outputs shared by all packages.

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
    """A batch whose tensors `DataLoader(pin_memory=True)` can pin for asynchronous copies to a GPU."""

    def pin_memory(self) -> Self:
        """Return the batch with its tensors in page-locked memory, except tensors on the meta device."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}  # type: ignore[arg-type]
        pinned = {name: value.pin_memory() for name, value in values.items() if _has_data(value)}
        return replace(self, **pinned)  # type: ignore[type-var]


def _has_data(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and not value.is_meta


@dataclass
class CTBatch(_PinnedTensors):
    """A batch of CT volumes with the reports of their studies.

    Attributes:
        volume: (B, 1, D, H, W) float32, scaled to the volume spec's output range.
        study: (B,) int64, integer code of the study; equal for images of one study.
        row: (B,) int64, row number of each item in the full manifest.
        report: B report texts (findings and impression joined; "" if missing).
        labels: (B, F) float32: 1, 0, -1 (uncertain) or NaN (blank); None if the task must not see labels.
        projection: (B, H, W) float32 in [0, 1], frontal projection of each scan, bone bright; None if not requested.
        unreadable: rows that were replaced because they are unreadable, with reasons; counted by `data.set_aside`.
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
    """A batch of radiographs, preprocessed for an X-ray expert.

    Attributes:
        image: (B, C, H, W) float32, output of the expert's `preprocess`.
        study: (B,) int64, integer code of the study.
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
    """The output of a CT encoder.

    Attributes:
        pooled: (B, D_c), one vector per volume.
        tokens: (B, T, D_c), token grid flattened in D, H, W order.
    """

    pooled: Tensor
    tokens: Tensor
