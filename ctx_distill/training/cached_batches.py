"""Batches of CT volumes that stay on the host and are encoded in micro-batches (`ctx_distill.training.gradient_cache`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ctx_distill.errors import InputError
from ctx_distill.training.gradient_cache import encode_cached
from ctx_distill.types import CTBatch

HostStorage = Literal["float32", "float16"]


def check_micro_batch(micro_batch: int | None) -> None:
    """Check the size of a micro-batch.

    Raises:
        InputError: The size is below 1.
    """
    if micro_batch is not None and micro_batch < 1:
        raise InputError(
            f"micro_batch is {micro_batch}; expected 1 or more volumes, or null for the complete batch at once. "
            "Set --model.init_args.micro_batch=16."
        )


def on_host(batch: CTBatch, storage: HostStorage, move: Callable[[CTBatch], CTBatch]) -> CTBatch:
    """Move a batch to the device, except its volumes.

    Args:
        batch: On the host.
        storage: Type of the waiting volumes. float16 halves their memory; its error on values in [-1, 1] is at most
            2^-12, which is 0.25 HU in a window of 2,000 HU (**ours**).
        move: Moves a batch to the device.
    """
    volume = batch.volume
    if storage == "float16":
        # Pinned if the loader's memory was pinned, so that micro-batches are copied asynchronously.
        volume = torch.empty(volume.shape, dtype=torch.float16, pin_memory=volume.is_pinned()).copy_(volume)
    return replace(move(replace(batch, volume=volume[:0])), volume=volume)


def split_rows(batch: CTBatch, rows: int) -> list[CTBatch]:
    """Split a batch into parts of `rows` rows; the last one may be smaller. Tensors are views."""

    def part(value: Any, start: int) -> Any:
        return None if value is None else value[start : start + rows]

    names = [field.name for field in fields(batch)]
    starts = range(0, len(batch.row), rows)
    return [replace(batch, **{name: part(getattr(batch, name), start) for name in names}) for start in starts]


def encode_in_micro_batches(
    encode: Callable[[CTBatch], tuple[Tensor, ...]],
    batch: CTBatch,
    micro_batch: int,
    parameters: Iterable[Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Encode a batch whose volumes are on the host.

    Args:
        encode: Returns tensors (b, ...) of a batch on the device; see `encode_cached` for its constraints.
        batch: Volumes on the host, the rest on the device.
        micro_batch: Volumes on the device at once.
        parameters: Trainable parameters of `encode`.
        device: Device of the model.
        dtype: Type of the volumes passed to `encode`.

    Returns:
        The tensors of `encode`, each (B, ...), with the gradients of encoding all rows at once.
    """

    def encode_part(part: CTBatch) -> tuple[Tensor, ...]:
        return encode(replace(part, volume=part.volume.to(device, non_blocking=True).to(dtype)))

    if len(batch.row) <= micro_batch:
        return encode_part(batch)
    return encode_cached(encode_part, split_rows(batch, micro_batch), parameters, device)
