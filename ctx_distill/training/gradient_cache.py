"""Features of a batch too large to encode at once, with exact gradients (GradCache, Gao et al. 2021, arXiv 2101.06983).

A contrastive loss needs the features of the whole batch at once, but not the activations behind them:

    1. encode every micro-batch without a graph and keep only its features (and the random state it began with),
    2. loss and d loss / d features on the whole, gathered batch,
    3. encode every micro-batch again, from the same random state, and backpropagate its rows of d loss / d features.

Memory is then that of one micro-batch's activations and of the whole batch's features; time is one more forward.

Steps 1 and 3 are forward and backward of one autograd node (**ours**; the paper's own code runs the steps one by one).
So whatever stands around a plain step stays as it is: gradient scaling, clipping, accumulation. So does DDP: all
micro-batches but the last leave its reducer alone, as under `no_sync`, because step 3 adds the gradients up outside
it, and hands it each parameter's sum once.
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
    """torch's generators at one moment: the CPU's, and the device's where that is another."""

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> _RandomState:
        other = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(device, torch.get_rng_state(), other)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw from this state inside; the generators go on from where they were afterwards."""
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
        # Weights cast without a graph must not stay in autocast's cache, where a later pass would find them.
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
                    # Not in place: autograd may give two parameters one and the same tensor.
                    totals[place] = part if total is None else total + part
        return (None, None, None, *totals)


def encode_cached(
    encode: Callable[[M], tuple[Tensor, ...]],
    micro_batches: Sequence[M],
    parameters: Iterable[Tensor],
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Features of all micro-batches, holding the activations of one at a time in forward and in backward.

    Gradients are those of encoding each micro-batch with a graph and concatenating, dropout and augmentation included.

    Args:
        encode: gives the same number of tensors (b, ...) for each micro-batch: features, or per-row terms of a loss.
            It is called twice a micro-batch, so what it draws must come from torch's own generators, what it counts
            (running statistics) counts twice, and it must not talk to other ranks. It is the place to bring inputs to
            the device, or to read them.
        micro_batches: what `encode` takes, of any size each.
        parameters: what `encode` learns; those that ask for no gradient are passed over, and nothing else gets one.
        device: where `encode` computes; its random state is replayed.

    Returns:
        The tensors of `encode`, each (sum of b, ...).

    Raises:
        ValueError: no micro-batch, or no parameter that learns.
    """
    learnt = tuple(parameter for parameter in parameters if parameter.requires_grad)
    if not len(micro_batches) or not learnt:
        raise ValueError(
            f"encode_cached got {len(micro_batches)} micro-batches and {len(learnt)} parameters with a gradient; "
            "expected at least one of each"
        )
    features: tuple[Tensor, ...] = _Encode.apply(encode, micro_batches, device, *learnt)
    return features
