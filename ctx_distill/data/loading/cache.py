"""Cache prepared tensors in memory, within a limit, for the lifetime of the process."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache

from torch import Tensor


class TensorCache:
    """Cache tensors until the limit is reached; later tensors are computed each time.

    Nothing is evicted: when sweeping over a data set that does not fit, evicting the oldest would always miss.

    Args:
        limit_bytes: maximum size of the cached tensors.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._tensors: dict[Hashable, Tensor] = {}

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._tensors

    def fits(self, tensor: Tensor) -> bool:
        """Return whether another tensor of this size fits."""
        return self.held_bytes + tensor.nbytes <= self.limit_bytes

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return the tensor of a key; compute it if it is not cached."""
        return self.get_all((key,), lambda: (make(),))[0]

    def get_all(self, keys: Sequence[Hashable], make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return the tensors of several keys; compute all of them if one is not cached."""
        if all(key in self._tensors for key in keys):
            return tuple(self._tensors[key] for key in keys)
        tensors = make()
        for key, tensor in zip(keys, tensors, strict=True):
            if key not in self._tensors and self.fits(tensor):
                self._tensors[key] = tensor
                self.held_bytes += tensor.nbytes
        return tensors


@lru_cache(maxsize=4)
def shared_cache(gigabytes: float) -> TensorCache:
    """Return this process's cache of this size, shared by all stages in the process."""
    return TensorCache(int(gigabytes * 1e9))
