"""Prepared tensors kept in memory, within a limit, for as long as the process lives."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache

from torch import Tensor


class TensorCache:
    """Keeps what it is given until its limit is reached; later tensors are made anew each time.

    Nothing is put out again: in a sweep over a data set that does not fit, putting the oldest out would miss always.

    Args:
        limit_bytes: memory that it may hold.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._kept: dict[Hashable, Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def fits(self, tensor: Tensor) -> bool:
        """Whether there is room for one more tensor of this size."""
        return self.held_bytes + tensor.nbytes <= self.limit_bytes

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of a key, made when it is not kept."""
        return self.get_all((key,), lambda: (make(),))[0]

    def get_all(self, keys: Sequence[Hashable], make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The tensors of several keys, made together when one of them is not kept."""
        if all(key in self._kept for key in keys):
            return tuple(self._kept[key] for key in keys)
        made = make()
        for key, tensor in zip(keys, made, strict=True):
            if key not in self._kept and self.fits(tensor):
                self._kept[key] = tensor
                self.held_bytes += tensor.nbytes
        return made


@lru_cache(maxsize=4)
def shared_cache(gigabytes: float) -> TensorCache:
    """The process's cache of this size; stages that run in one process share it."""
    return TensorCache(int(gigabytes * 1e9))
