"""A second device that computes on the CPU and refuses what a GPU refuses: operations that mix its tensors with the CPU's.

Code that mixes devices runs on a machine without a GPU without a word, and fails at its first contact with one. Under
`PretendDevice` the tensors of the device `pretend` are wrappers around CPU tensors. Torch takes them for tensors of another
device: `numpy()` is refused, `cpu()` copies, an operation on tensors of both devices raises, and a generator of the CPU
cannot fill them. Values, gradients and random numbers are those of the CPU, so a run can be compared with one on it.

What it cannot show: autocast, streams, kernels, memory, and whatever asks for `cuda` by name.
"""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any, ClassVar

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.accelerators.cpu import CPUAccelerator
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""Whether this torch can have a device that is written in Python (2.10 and newer)."""
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default, aten.lift_fresh.default}
"""Operations that may read one device and write the other."""
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.equal.default,
}
"""Operations whose result the host must have before it goes on."""


def register() -> None:
    """Register the device with torch, and its accelerator with Lightning, once per process."""
    if NAME not in AcceleratorRegistry:
        backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
        AcceleratorRegistry.register(NAME, PretendAccelerator, description="wrapped CPU tensors")


class _Backend(getattr(backend_registration, "_DummyBackendModule", object)):  # type: ignore[misc]
    """What torch asks of `torch.pretend`."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        """Let autocast be named; it casts nothing on this device."""
        return [torch.bfloat16]

    @staticmethod
    def get_rng_state(device: Any = None) -> Tensor:
        """Give the CPU's random state: the device draws its numbers."""
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: Tensor, device: Any = None) -> None:
        """Put it back."""
        torch.set_rng_state(state)


class Generator(torch.Generator):
    """Takes the place of `torch.Generator`, so that one can be made for the device."""

    of_the_device: ClassVar[set[int]] = set()
    """Those alive that were made for the device; an operation gets another Python object of the same generator."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        """Make one that draws the CPU's numbers."""
        made = super().__new__(cls, "cpu")
        if torch.device(device).type == NAME:
            cls.of_the_device.add(made._cdata)
        return made

    def __del__(self) -> None:
        """Another one may come to have this one's address."""
        self.of_the_device.discard(self._cdata)


class DeviceTensor(Tensor):
    """A tensor of the device `pretend`; `inner` holds its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> DeviceTensor:
        """Wrap a tensor of the CPU."""
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=torch.device(NAME, 0), requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    def __init__(self, inner: Tensor) -> None:
        """Leave everything to `__new__`."""

    def __repr__(self, **_: Any) -> str:
        """Show the values."""
        return f"DeviceTensor({self.inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the values: a checkpoint holds plain tensors."""
        return self.inner.__reduce_ex__(protocol)

    def tolist(self) -> Any:
        """Copy to the CPU, as a GPU's tensor does; torch refuses it of a subclass."""
        return self.cpu().tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        """Make a tensor on the CPU and move it: torch would look for the device's own memory."""
        made: Tensor = torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})
        return made

    def __getitem__(self, index: Any) -> Tensor:
        """Take lists in an index as tensors of the device, for the same reason."""
        several = index if isinstance(index, tuple) else (index,)
        chosen: Tensor = super().__getitem__(
            tuple(torch.tensor(each, device=self.device) if isinstance(each, list) else each for each in several)
        )
        return chosen

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the values."""
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU and give its result the device that it has on two devices.

    Raises:
        RuntimeError: it mixes the devices.
    """
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    mine = [x for x in tensors if isinstance(x, DeviceTensor)]
    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if func not in COPIES and mine and any(x.dim() and not isinstance(x, DeviceTensor) for x in tensors):
        where = ", ".join(f"{x.device.type} {tuple(x.shape)}" for x in tensors)
        raise RuntimeError(f"expected all tensors to be on the same device, but {func} got {where}")
    on_device = wanted == NAME or (bool(mine) and wanted is None)
    generator = kwargs.get("generator")
    if generator is not None and (generator._cdata in Generator.of_the_device) != on_device:
        raise RuntimeError(f"expected a generator of the tensor's own device, but {func} got one of the other")
    plain = tree_map(lambda x: x.inner if isinstance(x, DeviceTensor) else x, (args, kwargs))
    made = func(*plain[0], **plain[1])
    if func is aten.copy_.default:
        return args[0]
    if not on_device:
        return made
    # What an operation in place gives back is the wrapper that it got.
    known = {id(x.inner): x for x in mine}

    def give(x: Any) -> Any:
        if not isinstance(x, Tensor) or id(x) in known:
            return known.get(id(x), x)
        with torch.inference_mode(
            x.is_inference()
        ):  # a view of a tensor from outside of inference is none of inference
            return DeviceTensor(x)

    return tree_map(give, made)


def _moved(make: Any) -> Any:
    """`torch.tensor` or `torch.as_tensor` whose result goes to the device by a copy."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(*args, device=device, **kwargs)  # type: ignore[no-any-return]
        return make(*args, **kwargs).to(device)  # type: ignore[no-any-return]

    return made


class PretendDevice(TorchDispatchMode):
    """Make `pretend` a device of this process while the context is open.

    Attributes:
        syncs: how often each place in the package made the host wait for the device, as (function, operation): a value that
            is read, a copy to the CPU, a selection whose size the host must know, or a copy to the device that does not
            say `non_blocking`. Those are what `torch.cuda.set_sync_debug_mode` finds on a GPU.
    """

    def __init__(self) -> None:
        register()
        super().__init__()
        self.syncs: Counter[tuple[str, str]] = Counter()
        self._before: list[dict[str, Any]] = []

    def __enter__(self) -> PretendDevice:
        """Open the context, in which torch makes tensors and generators for the device too."""
        self._before.append({name: getattr(torch, name) for name in ("tensor", "as_tensor", "Generator")})
        if len(self._before) == 1:
            # made on the CPU and moved: in the threads that run a backward pass torch would look for the device's own
            torch.tensor, torch.as_tensor = _moved(torch.tensor), _moved(torch.as_tensor)
            torch.Generator = Generator  # type: ignore[misc]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Close it."""
        super().__exit__(*error)
        for name, value in self._before.pop().items():
            setattr(torch, name, value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; count it where the host would wait."""
        if func._can_decompose():  # inference mode hands over operations that others take apart before
            with self:
                return func.decompose(*args, **(kwargs or {}))
        self._count(func, args, kwargs or {})
        return compute(func, args, kwargs or {})

    def _count(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        tensors = [x for x in args if isinstance(x, Tensor)]
        mine = [isinstance(x, DeviceTensor) for x in tensors]
        masks = [
            x for x in tree_leaves(args[1:]) if isinstance(x, DeviceTensor) and x.dtype in (torch.bool, torch.uint8)
        ]
        selects = func in (
            aten.index.Tensor,
            aten.index_put.default,
            aten.index_put_.default,
            aten._index_put_impl_.default,
        )
        waits = (func in READS and any(mine)) or (selects and bool(masks))
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == NAME
            waits = there != mine[0] and not kwargs.get("non_blocking")
        elif func is aten.copy_.default and len(mine) == 2:
            waits = mine[0] != mine[1] and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        if waits:
            self.syncs[package_function(), str(func)] += 1


def package_function() -> str:
    """`module:function` of the innermost frame that is the package's; else, in brackets, of the innermost outside of torch."""
    frame: FrameType | None = sys._getframe(1)
    outside = ""
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        where = f"{module}:{frame.f_code.co_qualname}"
        if module.startswith("ctx_distill."):
            return where.removeprefix("ctx_distill.")
        if not outside and not module.startswith(("torch", "pretend_device")):
            outside = where
        frame = frame.f_back
    return f"({outside})"


class PretendAccelerator(CPUAccelerator):
    """Lightning's accelerator of the device: one per process."""

    def setup_device(self, device: torch.device) -> None:
        """Accept the device."""

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """Name the one device."""
        return [torch.device(NAME, 0)] * int(devices)

    @classmethod
    def name(cls) -> str:
        """Name of the accelerator."""
        return NAME


assert issubclass(PretendAccelerator, Accelerator)
