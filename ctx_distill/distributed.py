"""Rank and world size asked at call time, and gathers whose gradient equals one process with the whole batch.

The convention, in one place: **every rank computes its loss on the global batch** (all ranks' rows, gathered in rank
order) **and DDP averages the ranks' gradients**. What is minimised is then the mean over ranks of what each rank
computed, so the backward of a gather hands every rank the *sum* over ranks of the gradients of its rows; dividing by
the world size is DDP's part. Both a parameter in front of the gather (an encoder) and one behind it (the temperature)
then get exactly the gradient of one process, also where ranks hold unequal numbers of rows.

Gathers are collective: every rank calls them in the same order, and a tensor needs a gradient on all ranks or on none.

**Devices.** NCCL refuses tensors on the CPU. Gathers of tensors therefore take them on the rank's own device, which is
`trainer.strategy.root_device`, not `task.device`: Lightning moves the module to the CPU at the end of every loop. Objects,
flags and barriers go through a gloo group of their own on the CPU (`host_group`), at any device.
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
    """Whether a process group stands now."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of ranks now; 1 without a process group."""
    return int(dist.get_world_size()) if is_distributed() else 1


def rank() -> int:
    """This process's rank now; 0 without a process group."""
    return int(dist.get_rank()) if is_distributed() else 0


def barrier() -> None:
    """Wait for all ranks, at most `ALIVE_LIMIT`; nothing without a process group.

    Where rank 0 works meanwhile, use `run_on_rank_zero`.
    """
    if world_size() > 1:
        # `dist.barrier` would choose a GPU to put a tensor on.
        met = dist.all_reduce(torch.zeros(1), group=host_group(), async_op=True)
        assert met is not None
        met.wait(ALIVE_LIMIT)


def gather_row_counts(rows: int, device: torch.device) -> list[int]:
    """The number of rows that each rank holds, in rank order; exchanged on the rank's `device`."""
    if world_size() == 1:
        return [rows]
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([rows], dtype=torch.int64, device=device))
    return [int(count) for count in counts]


class _GatherRows(torch.autograd.Function):
    """All ranks' rows; backward sums the ranks' gradients and takes this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.start, ctx.rows = sum(counts[: rank()]), x.shape[0]
        # Collectives need equal shapes, so short ranks are padded to the longest and trimmed again.
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
    """Rows of all ranks in rank order, differentiable (see the module's convention).

    Args:
        x: (b, ...) this rank's rows; b may differ between ranks, the other dimensions may not. Integer and boolean
            tensors are gathered too, without a gradient.

    Returns:
        (sum of b, ...); x itself without a process group.
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
    """Which of the gathered rows come for the first time.

    Args:
        rows: (B,) int64 of the global batch; a held-out row that a sampler repeated comes twice.

    Returns:
        (B,) bool.
    """
    same = rows[:, None] == rows[None]
    return same.int().argmax(dim=1) == torch.arange(len(rows), device=rows.device)


def own_first_rows(rows: Tensor) -> Tensor:
    """`first_rows` of the global batch, for this rank's rows (b,) alone; collective."""
    if world_size() == 1:
        return torch.ones_like(rows, dtype=torch.bool)
    counts = gather_row_counts(len(rows), rows.device)
    start = sum(counts[: rank()])
    return first_rows(gather_with_gradient(rows))[start : start + len(rows)]


def own_share(total: int) -> slice:
    """Return this rank's consecutive part of `total` items; the parts of all ranks in rank order are all items."""
    share = -(-total // world_size())
    return slice(rank() * share, (rank() + 1) * share)


def gather_objects(items: list[T]) -> list[T]:
    """Items of all ranks in rank order, pickled between this run's own processes (texts, names; no tensors of a GPU).

    Collective, on the CPU: NCCL would copy the pickled bytes of all ranks to every GPU.
    """
    if world_size() == 1:
        return list(items)
    parts: list[list[T] | None] = [None] * world_size()
    dist.all_gather_object(parts, list(items), group=host_group())
    return [item for part in parts if part is not None for item in part]


def global_mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean over the rows of all ranks, with the gradient of one process.

    The mean of ranks' means is another number where ranks hold unequal rows (or unequal numbers of tokens).

    Args:
        values: (b,) a term a row.
        weights: (b,) non-negative, default all one.

    Returns:
        () the same on every rank; 0 where all weights are 0.
    """
    weights = torch.ones_like(values) if weights is None else weights
    return global_ratio(values * weights, weights)


def global_ratio(numerators: Tensor, denominators: Tensor) -> Tensor:
    """Sum over the rows of all ranks of one divided by that of the other, with the gradient of one process.

    Args:
        numerators: (b,) floating.
        denominators: (b,) non-negative, of the same type.

    Returns:
        () the same on every rank; 0 where all denominators are 0.
    """
    sums = gather_with_gradient(torch.stack([numerators.sum(), denominators.sum()])[None]).sum(0)
    return sums[0] / sums[1].clamp_min(torch.finfo(numerators.dtype).tiny)


_host_group: Any = None


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on any rank; the same on every rank.

    Collective, over a group of its own on the CPU: it neither waits for a GPU nor falls between the gradients' calls.
    """
    if world_size() == 1:
        return list(flags)
    values = torch.tensor([int(flag) for flag in flags])
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=host_group())
    return [bool(value) for value in values]


def host_group() -> Any:
    """A gloo group of all ranks for words between the processes; made at the first call, which is collective."""
    global _host_group
    if _host_group is None or _host_group[0] is not dist.group.WORLD:
        # no limit of its own to speak of: training/callbacks/watchdog.py ends a run that hangs, and says who holds it up
        _host_group = (dist.group.WORLD, dist.new_group(backend="gloo", timeout=timedelta(days=7)))
    return _host_group[1]


@torch.no_grad()
def copy_from_rank_zero(module: nn.Module) -> None:
    """Give rank 0's parameters and buffers to all ranks; collective, through the host, and so on any device."""
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
"""Seconds between two signs of life of rank 0 in `run_on_rank_zero`."""
ALIVE_LIMIT = timedelta(minutes=30)
"""Longest wait for a sign of life, which a library that holds Python's lock delays, and for all ranks in `barrier`."""
_WORKING, _DONE, _FAILED = 0, 1, 2


def run_on_rank_zero(work: Callable[[], T]) -> T | None:
    """Run something long on rank 0 while all other ranks wait for its end; collective.

    The others wait in short collectives on the CPU: a thread of rank 0 sends a sign of life every `ALIVE_EVERY_S`. So no
    time limit of a process group bounds the work, and the others still end when rank 0 fails, dies or stands still.

    Args:
        work: must not call collectives.

    Returns:
        What `work` returned on rank 0, None on the others.

    Raises:
        InputError, StopRequested: `work` raised it; on all ranks, so that all end with the same exit status.
        RuntimeError: on the other ranks: `work` raised another error, or rank 0 is gone.
    """
    if world_size() == 1:
        return work()
    if rank() != 0:
        _wait_for_rank_zero()
        return None
    over = threading.Event()
    signs = threading.Thread(target=_show_life, args=(over,), name="signs of life", daemon=True)
    group = host_group()
    signs.start()
    try:
        result = work()
    except BaseException as error:
        over.set()
        signs.join()
        with contextlib.suppress(RuntimeError):  # whom nobody waits for any more, has its own error to tell
            _send_state(_FAILED)
            dist.broadcast_object_list([type(error).__name__, str(error)], src=0, group=group)
        raise
    over.set()
    signs.join()
    _send_state(_DONE)
    return result


def _show_life(over: threading.Event) -> None:
    while not over.wait(ALIVE_EVERY_S):
        try:
            _send_state(_WORKING)
        except RuntimeError:  # a waiting rank is gone: the main thread gets this error with its next collective
            return


def _send_state(state: int) -> int:
    """Broadcast rank 0's state; the others' argument is overwritten."""
    value = torch.tensor([state])
    sent = dist.broadcast(value, src=0, group=host_group(), async_op=True)
    assert sent is not None
    sent.wait(ALIVE_LIMIT)
    return int(value)


def _wait_for_rank_zero() -> None:
    while (state := _send_state(_WORKING)) == _WORKING:
        pass
    if state == _FAILED:
        told: list[Any] = [None, None]
        dist.broadcast_object_list(told, src=0, group=host_group())
        _raise_as_rank_zero(*told)


def _raise_as_rank_zero(kind: str, message: str) -> NoReturn:
    for known in (InputError, StopRequested):
        if kind == known.__name__:
            raise known(message)
    raise RuntimeError(f"rank 0 ended with {kind}: {message}")
