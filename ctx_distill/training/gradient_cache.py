"""Encode a large batch in micro-batches, with exact gradients (GradCache, Gao et al. 2021, arXiv 2101.06983).

A contrastive loss needs the features of the complete batch at once, but not their activations:

    1. encode every micro-batch without a graph, and keep its features and its initial random state,
    2. compute the loss and d loss / d features on the complete, gathered batch,
    3. encode every micro-batch again from the same random state, and backpropagate its rows of d loss / d features.

Memory is that of one micro-batch's activations plus the complete batch's features, at the cost of a second forward pass.

Steps 1 and 3 are the forward and backward of one autograd node (**ours**; the authors' code runs the steps separately).
Gradient scaling, clipping and accumulation therefore work unchanged. So does DDP: step 3 sums the gradients outside the
reducer and passes it each parameter's sum once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

M = TypeVar("M")


@dataclass(frozen=True)
class _RandomState:
    """States of torch's generators: the CPU's, and the device's if it is not the CPU."""

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> _RandomState:
        other = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(device, torch.get_rng_state(), other)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Use this state inside the block, and restore the generators afterwards."""
        with torch.random.fork_rng([] if self.accelerator is None else [self.device], device_type=self.device.type):
            torch.set_rng_state(self.cpu)
            if self.accelerator is not None:
                torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)
            yield


class _Encode(torch.autograd.Function):
    """Forward: step 1. Backward: step 3, with the parameters' gradients as its result."""

    @staticmethod
    def forward(
        ctx: Any,
        encode: Callable[[M], tuple[Tensor, ...]],
        micro_batches: Sequence[M],
        device: torch.device,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.encode, ctx.micro_batches, ctx.device, ctx.parameters = encode, micro_batches, device, parameters
        ctx.autocast = (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))
        ctx.states, ctx.rows = [], []
        parts: list[tuple[Tensor, ...]] = []
        # Weights cast without a graph must not stay in autocast's cache, where a later pass would reuse them.
        with torch.autocast(device.type, enabled=ctx.autocast[0], dtype=ctx.autocast[1], cache_enabled=False):
            for micro_batch in micro_batches:
                ctx.states.append(_RandomState.now(device))
                parts.append(encode(micro_batch))
                ctx.rows.append(len(parts[-1][0]))
        features = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        ctx.mark_non_differentiable(*(x for x in features if not x.is_floating_point()))
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        totals: list[Tensor | None] = [None] * len(ctx.parameters)
        start = 0
        for micro_batch, state, rows in zip(ctx.micro_batches, ctx.states, ctx.rows, strict=True):
            with (
                torch.enable_grad(),
                state.replayed(),
                torch.autocast(ctx.device.type, enabled=ctx.autocast[0], dtype=ctx.autocast[1]),
            ):
                features = ctx.encode(micro_batch)
            rows_of = slice(start, start + rows)
            start += rows
            outputs = [x for x in features if x.requires_grad]
            if not outputs:
                continue
            cached = [gradient[rows_of] for x, gradient in zip(features, gradients, strict=True) if x.requires_grad]
            parts = torch.autograd.grad(outputs, ctx.parameters, cached, allow_unused=True)
            for place, part in enumerate(parts):
                if part is not None:
                    total = totals[place]
                    # Not in place, because autograd may return the same tensor for two parameters.
                    totals[place] = part if total is None else total + part
        return (None, None, None, *totals)


def encode_cached(
    encode: Callable[[M], tuple[Tensor, ...]],
    micro_batches: Sequence[M],
    parameters: Iterable[Tensor],
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Encode all micro-batches, holding the activations of only one at a time in forward and backward.

    The gradients are those of encoding each micro-batch with a graph and concatenating, including dropout and
    augmentation.

    Args:
        encode: Returns the same number of tensors (b, ...) for each micro-batch: features, or per-row loss terms. It is
            called twice per micro-batch. So its randomness must come from torch's generators, running statistics are
            updated twice, and it must not communicate with other ranks. It should move inputs to the device.
        micro_batches: Inputs of `encode`, each of any size.
        parameters: Trainable parameters of `encode`; frozen ones are skipped, and no other tensor gets a gradient.
        device: Device of `encode`, whose random state is replayed.

    Returns:
        The tensors of `encode`, each (sum of b, ...).

    Raises:
        ValueError: There is no micro-batch, or no trainable parameter.
    """
    trainable = tuple(parameter for parameter in parameters if parameter.requires_grad)
    if not len(micro_batches) or not trainable:
        raise ValueError(
            f"encode_cached got {len(micro_batches)} micro-batches and {len(trainable)} parameters with a gradient; "
            "expected at least one of each"
        )
    features: tuple[Tensor, ...] = _Encode.apply(encode, micro_batches, device, *trainable)
    return features
