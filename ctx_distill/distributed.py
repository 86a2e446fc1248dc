"""Query rank and world size at call time, and gather tensors with the gradient of a single process.

Convention: **every rank computes its loss on the global batch** (the rows of all ranks, gathered in rank order) **and DDP
averages the gradients of the ranks**. This minimises the mean over ranks of their losses. The backward pass of a gather
therefore gives every rank the *sum* over ranks of the gradients of its rows, and DDP divides by the world size. Parameters
before the gather (an encoder) and after it (the temperature) then get exactly the gradient of a single process, even with
unequal numbers of rows per rank.

Gathers are collective: every rank calls them in the same order, and a tensor needs a gradient on all ranks or on none.

**Devices.** NCCL does not support CPU tensors. Tensors are therefore gathered on the rank's device, which is
`trainer.strategy.root_device`, not `task.device`: Lightning moves the module to the CPU at the end of every loop. Objects,
flags and barriers use a separate gloo group on the CPU (`host_group`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ctx_distill.errors import InputError
from ctx_distill.signals import StopRequested

T = TypeVar("T")


def is_distributed() -> bool:
    """Return whether a process group is initialised."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return the current number of ranks; 1 without a process group."""
    return int(dist.get_world_size()) if is_distributed() else 1


def rank() -> int:
    """Return the current rank of this process; 0 without a process group."""
    return int(dist.get_rank()) if is_distributed() else 0


def barrier() -> None:
    """Wait for all ranks, at most `ALIVE_LIMIT`; does nothing without a process group.

    Use `run_on_rank_zero` if rank 0 works while the others wait.
    """
    if world_size() > 1:
        # `dist.barrier` would allocate a tensor on a GPU.
        reduction = dist.all_reduce(torch.zeros(1), group=host_group(), async_op=True)
        assert reduction is not None
        reduction.wait(ALIVE_LIMIT)


def gather_row_counts(rows: int, device: torch.device) -> list[int]:
    """Return the number of rows of each rank in rank order, exchanged on the rank's `device`."""
    if world_size() == 1:
        return [rows]
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([rows], dtype=torch.int64, device=device))
    return [int(count) for count in counts]


class _GatherRows(torch.autograd.Function):
    """Gather the rows of all ranks; backward sums the gradients over ranks and selects this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.start, ctx.rows = sum(counts[: rank()]), x.shape[0]
        # Collectives need equal shapes, so all ranks pad to the max number of rows and trim afterwards.
        padded = x.new_zeros((max(counts), *x.shape[1:]))
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.rows], None


def gather_with_gradient(x: Tensor) -> Tensor:
    """Gather the rows of all ranks in rank order, differentiably (see the convention of this module).

    Args:
        x: (b, ...) this rank's rows; only b may differ between ranks. Integer and boolean tensors are gathered without a
            gradient.

    Returns:
        (sum of b, ...); x without a process group.
    """
    if world_size() == 1:
        return x
    counts = gather_row_counts(x.shape[0], x.device)
    if max(counts) == 0:
        return x
    if x.dtype == torch.bool:
        gathered: Tensor = _GatherRows.apply(x.to(torch.uint8), counts)
        return gathered.to(torch.bool)
    result: Tensor = _GatherRows.apply(x, counts)
    return result


def first_rows(rows: Tensor) -> Tensor:
    """Return which of the gathered rows occur for the first time.

    Args:
        rows: (B,) int64 rows of the global batch; rows that a sampler repeated as padding occur twice.

    Returns:
        (B,) bool.
    """
    same = rows[:, None] == rows[None]
    return same.int().argmax(dim=1) == torch.arange(len(rows), device=rows.device)


def own_first_rows(rows: Tensor) -> Tensor:
    """Return `first_rows` of the global batch for this rank's rows (b,); collective."""
    if world_size() == 1:
        return torch.ones_like(rows, dtype=torch.bool)
    counts = gather_row_counts(len(rows), rows.device)
    start = sum(counts[: rank()])
    return first_rows(gather_with_gradient(rows))[start : start + len(rows)]


def own_share(total: int) -> slice:
    """Return this rank's consecutive part of `total` items; the parts of all ranks cover all items in rank order."""
    share = -(-total // world_size())
    return slice(rank() * share, (rank() + 1) * share)


def gather_objects(items: list[T]) -> list[T]:
    """Gather the items of all ranks in rank order, pickled between the processes of this run.

    Use it for texts and names, not for GPU tensors. Collective, on the CPU: NCCL would copy the pickled bytes of all ranks
    to every GPU.
    """
    if world_size() == 1:
        return list(items)
    parts: list[list[T] | None] = [None] * world_size()
    dist.all_gather_object(parts, list(items), group=host_group())
    return [item for part in parts if part is not None for item in part]


def global_mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the weighted mean over the rows of all ranks, with the gradient of a single process.

    It differs from the mean of the ranks' means if ranks have unequal numbers of rows (or tokens).

    Args:
        values: (b,) one term per row.
        weights: (b,) non-negative, default all one.

    Returns:
        (), equal on every rank; 0 if all weights are 0.
    """
    weights = torch.ones_like(values) if weights is None else weights
    return global_ratio(values * weights, weights)


def global_ratio(numerators: Tensor, denominators: Tensor) -> Tensor:
    """Return the ratio of two sums over the rows of all ranks, with the gradient of a single process.

    Args:
        numerators: (b,) floating.
        denominators: (b,) non-negative, of the same type.

    Returns:
        (), equal on every rank; 0 if all denominators are 0.
    """
    sums = gather_with_gradient(torch.stack([numerators.sum(), denominators.sum()])[None]).sum(0)
    return sums[0] / sums[1].clamp_min(torch.finfo(numerators.dtype).tiny)


_host_group: Any = None


def any_rank(*flags: bool) -> list[bool]:
    """Return for each flag whether it is set on any rank.

    Collective, over a separate group on the CPU, so that it neither waits for a GPU nor interferes with gradient
    collectives.
    """
    if world_size() == 1:
        return list(flags)
    values = torch.tensor([int(flag) for flag in flags])
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=host_group())
    return [bool(value) for value in values]


def host_group() -> Any:
    """Return a gloo group of all ranks for messages; created by the first call, which is collective."""
    global _host_group
    if _host_group is None or _host_group[0] is not dist.group.WORLD:
        # a long timeout, because training/callbacks/watchdog.py stops a hung run and reports the hung rank
        _host_group = (dist.group.WORLD, dist.new_group(backend="gloo", timeout=timedelta(days=7)))
    return _host_group[1]


@torch.no_grad()
def copy_from_rank_zero(module: nn.Module) -> None:
    """Copy rank 0's parameters and buffers to all ranks; collective, through host memory, for any device."""
    if world_size() == 1:
        return
    for value in module.state_dict().values():
        if isinstance(value, Tensor) and value.numel():
            host = value.cpu().contiguous()
            dist.broadcast(
                host.reshape(-1).view(torch.uint8), src=0, group=host_group()
            )  # bytes: gloo lacks some types
            value.copy_(host)


ALIVE_EVERY_S = 5.0
"""Seconds between heartbeats of rank 0 in `run_on_rank_zero`."""
ALIVE_LIMIT = timedelta(minutes=30)
"""Max wait for a heartbeat, which a library that holds the GIL delays, and for all ranks in `barrier`."""
_WORKING, _DONE, _FAILED = 0, 1, 2


def run_on_rank_zero(work: Callable[[], T]) -> T | None:
    """Run a long function on rank 0 while all other ranks wait; collective.

    The other ranks wait in short collectives on the CPU: a thread of rank 0 sends a heartbeat every `ALIVE_EVERY_S`. The
    work is therefore not bounded by the timeout of a process group, and the others still stop if rank 0 fails, dies or
    hangs.

    Args:
        work: function to run; must not call collectives.

    Returns:
        What `work` returned on rank 0, None on the others.

    Raises:
        InputError, StopRequested: `work` raised it; raised on all ranks, so that all exit with the same status.
        RuntimeError: on the other ranks, if `work` raised another error or rank 0 is gone.
    """
    if world_size() == 1:
        return work()
    if rank() != 0:
        _wait_for_rank_zero()
        return None
    finished = threading.Event()
    heartbeat = threading.Thread(target=_send_heartbeats, args=(finished,), name="heartbeat", daemon=True)
    group = host_group()
    heartbeat.start()
    try:
        result = work()
    except BaseException as error:
        finished.set()
        heartbeat.join()
        with contextlib.suppress(RuntimeError):  # the other ranks may be gone
            _send_state(_FAILED)
            dist.broadcast_object_list([type(error).__name__, str(error)], src=0, group=group)
        raise
    finished.set()
    heartbeat.join()
    _send_state(_DONE)
    return result


def _send_heartbeats(finished: threading.Event) -> None:
    while not finished.wait(ALIVE_EVERY_S):
        try:
            _send_state(_WORKING)
        except RuntimeError:  # a waiting rank is gone: the main thread gets this error from its next collective
            return


def _send_state(state: int) -> int:
    """Broadcast and return rank 0's state; the argument of other ranks is ignored."""
    value = torch.tensor([state])
    sent = dist.broadcast(value, src=0, group=host_group(), async_op=True)
    assert sent is not None
    sent.wait(ALIVE_LIMIT)
    return int(value)


def _wait_for_rank_zero() -> None:
    while (state := _send_state(_WORKING)) == _WORKING:
        pass
    if state == _FAILED:
        error: list[Any] = [None, None]
        dist.broadcast_object_list(error, src=0, group=host_group())
        _raise_as_rank_zero(*error)


def _raise_as_rank_zero(kind: str, message: str) -> NoReturn:
    for error_type in (InputError, StopRequested):
        if kind == error_type.__name__:
            raise error_type(message)
    raise RuntimeError(f"rank 0 failed with {kind}: {message}")
