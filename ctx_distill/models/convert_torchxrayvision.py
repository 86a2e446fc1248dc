"""Convert torchxrayvision's pickled weights to safetensors, without running what is pickled."""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import re
import types
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ctx_distill.files import write_json
from ctx_distill.models.weights import PROVENANCE_FILE, Provenance
from ctx_distill.types import InputError

logger = logging.getLogger(__name__)

XRV_ALL_SHA256 = "56524913dd16a906422e8d8b66a7a5c46be1d82eb7ac012d8103776f1aa68899"
"""SHA-256 of densenet121-res224-all as released (28,382,008 bytes).

torchxrayvision publishes no checksum of its own; this is the value that several unrelated public projects pin for
`nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt` of its release v1.
"""


class _Inert:
    """Stands for any class of a pickle: holds its state and does nothing."""

    dump_patches = False

    def __init__(self, *args: object, **kwargs: object) -> None:
        del args, kwargs

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    def extend(self, values: object) -> None: ...

    def add(self, value: object) -> None: ...


_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.nn.parameter", "Parameter"),
    ("torch", "Size"),
    ("torch", "device"),
    ("builtins", "set"),
    ("__builtin__", "set"),
}


class _InertUnpickler(pickle.Unpickler):
    """Rebuilds tensors and containers; every other class or function becomes `_Inert`, so nothing of it runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        return type(name.rsplit(".", 1)[-1], (_Inert,), {"__module__": module})


def _tensors(module: Any, prefix: str = "") -> dict[str, Any]:
    """The state dict of a module whose classes are inert."""
    found = {}
    state = vars(module)
    for kind in ("_parameters", "_buffers"):
        found.update({prefix + key: value.detach() for key, value in state.get(kind, {}).items() if value is not None})
    for key, child in state.get("_modules", {}).items():
        if child is not None:
            found.update(_tensors(child, f"{prefix}{key}."))
    return found


def _read_pickled_module(path: Path, data: bytes) -> dict[str, Any]:
    import torch

    try:
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # a whole module, as torchxrayvision releases them
        inert = types.ModuleType("ctx_distill_inert_pickle")
        vars(inert).update(vars(pickle), Unpickler=_InertUnpickler, load=lambda f, **k: _InertUnpickler(f, **k).load())
        try:
            value = torch.load(io.BytesIO(data), map_location="cpu", pickle_module=inert, weights_only=False)
        except Exception as error:  # whatever an odd pickle trips over, now that nothing in it can run
            raise InputError(f"{path}: not a checkpoint of torch ({type(error).__name__}: {error}).") from error
    if isinstance(value, dict):
        return value
    if not isinstance(getattr(value, "_modules", None), dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, expected a module or a state dict.")
    return _tensors(value)


def convert_torchxrayvision(path: Path, out: Path, sha256: str = XRV_ALL_SHA256) -> Path:
    """Turn a pickled torchxrayvision DenseNet into safetensors, once, without running what is pickled.

    Args:
        path: the release file (torchxrayvision keeps it in ~/.torchxrayvision/models_data/).
        out: folder to write: `model.safetensors` and `xrv_config.json`.
        sha256: what the file must hash to; the default is densenet121-res224-all. Others must be given.

    Raises:
        InputError: the file is missing, hashes to something else, or holds no DenseNet.
    """
    from safetensors.torch import save_file

    if not path.is_file():
        raise InputError(
            f"{path}: no such file. Download densenet121-res224-all from the release v1 of"
            " https://github.com/mlmed/torchxrayvision and give its path."
        )
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256.lower():
        raise InputError(
            f"{path}: SHA-256 is {found}, expected {sha256}. It was not read, for it is a pickle. Download it again;"
            " for another release file give its published or own checksum with --sha256."
        )
    state = _read_pickled_module(path, data)
    weights = {key: value.contiguous().clone() for key, value in state.items() if key.startswith("features.")}
    if "features.conv0.weight" not in weights or "features.norm5.weight" not in weights:
        raise InputError(
            f"{path}: holds {', '.join(sorted(state)[:3]) or 'no tensors'} ..., expected a torchxrayvision DenseNet"
            " (features.conv0 to features.norm5). Its ResNet and autoencoder are not supported."
        )
    config = {"architecture": "densenet", "image_size": 224, **_densenet_shape(weights)}
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors")
    write_json(out / "xrv_config.json", config)
    write_json(out / PROVENANCE_FILE, asdict(Provenance(path.stem, "torchxrayvision", None, "apache-2.0")))
    logger.info("%s: licence apache-2.0 (torchxrayvision), %d tensors", out, len(weights))
    return out


def _densenet_shape(weights: dict[str, Any]) -> dict[str, Any]:
    blocks: dict[int, int] = {}
    for key in weights:
        match = re.match(r"features\.denseblock(\d+)\.denselayer(\d+)\.conv1\.weight", key)
        if match:
            blocks[int(match[1])] = max(blocks.get(int(match[1]), 0), int(match[2]))
    growth = weights["features.denseblock1.denselayer1.conv2.weight"].shape[0]
    return {
        "block_config": [blocks[index] for index in sorted(blocks)],
        "growth_rate": growth,
        "num_init_features": weights["features.conv0.weight"].shape[0],
        "bn_size": weights["features.denseblock1.denselayer1.conv1.weight"].shape[0] // growth,
    }
