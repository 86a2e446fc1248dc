"""`ctx-distill` on a pretended accelerator: a CPU machine then shows which tensors would be on the wrong device.

    python tests/helpers/accelerator.py distill --data DATA --run RUN ...    as `ctx-distill distill ...`

The device is `cpu:1`. torch computes there as on `cpu`, so the numbers stay those of the CPU, and drops the index from the
tensors; this module remembers which storages were put there, or computed from such. Where a GPU would refuse, it raises:

- a collective of the world's group gets a tensor that is not there (NCCL: "No backend type associated with device type
  cpu"), or one of a gloo group on the host gets one that is;
- `numpy()` of a tensor that is there.

DDP's own collectives, in C++, and those of objects, whose device torch chooses, are not looked at.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu", 1)
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all_single", "broadcast", "gather", "reduce",
               "reduce_scatter", "reduce_scatter_tensor", "scatter")  # fmt: skip
GET_DEVICE = torch.Tensor.device.__get__
# A weak reference keeps the address of a storage that is gone from being used again.
_placed: dict[int, StorageWeakRef] = {}


def is_placed(tensor: Tensor) -> bool:
    """Whether a tensor is on the accelerator."""
    return tensor.untyped_storage()._cdata in _placed


def place(tensor: Tensor, there: bool = True) -> Tensor:
    """The tensor on the accelerator, or on the host: itself where it is there, else a copy."""
    if is_placed(tensor) == there:
        return tensor
    copy = tensor.clone()
    _mark(copy, there)
    return copy


def _mark(tensor: Tensor, there: bool) -> None:
    storage = tensor.untyped_storage()
    if there:
        _placed[storage._cdata] = StorageWeakRef(storage)
    else:
        _placed.pop(storage._cdata, None)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


class Functions(TorchFunctionMode):
    """What Python asks of tensors: their device, moves, new tensors on a device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func == GET_DEVICE:
            return DEVICE if is_placed(args[0]) else func(*args)
        if name in ("numpy", "__array__") and is_placed(args[0]):
            raise TypeError("numpy() of a tensor on the accelerator; copy it to the host first, with cpu()")
        device = kwargs.get("device")
        if name == "cpu":
            device = "cpu"
        elif name == "to" and device is None and len(args) > 1:
            other = args[1]
            if isinstance(other, Tensor):
                device = DEVICE if is_placed(other) else "cpu"
            elif isinstance(other, (str, torch.device)):
                device = other
        result = func(*args, **kwargs)
        if device is None or name == "set_default_device":
            return result
        there = torch.device(device) == DEVICE
        if isinstance(result, Tensor) and name in ("cpu", "to"):
            return place(result, there)
        for tensor in _tensors(result):
            _mark(tensor, there)
        return result


class Operations(TorchDispatchMode):
    """What is computed from tensors on the accelerator is there too, in backward as well."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = list(_tensors((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        if any(map(is_placed, inputs)):
            known = {tensor.untyped_storage()._cdata for tensor in inputs}  # written in place: it stays where it is
            for tensor in _tensors(result):
                if tensor.untyped_storage()._cdata not in known:
                    _mark(tensor, True)
        return result


def checked(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective that refuses tensors on the wrong device."""
    signature = inspect.signature(collective)

    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        world = given.get("group") in (None, dist.group.WORLD)
        for tensor in _tensors({name: value for name, value in given.items() if name != "group"}):
            if is_placed(tensor) != world:
                where = "on the accelerator" if is_placed(tensor) else "on the host"
                group = "the accelerator's" if world else "the host's"
                raise RuntimeError(f"{collective.__name__}: a tensor {where} was given to {group} process group")
        return collective(*args, **kwargs)

    return call


def main(arguments: list[str]) -> int:
    """Run a command of `ctx-distill`."""
    from lightning.pytorch.accelerators import CPUAccelerator

    from ctx_distill.commands import main as commands

    CPUAccelerator.get_parallel_devices = staticmethod(lambda devices: [DEVICE] * int(devices))  # type: ignore[method-assign]
    for name in COLLECTIVES:
        setattr(dist, name, checked(getattr(dist, name)))
    with Functions(), Operations():
        return commands.main(arguments)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    sys.exit(main(sys.argv[1:]))
