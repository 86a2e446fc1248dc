"""Pretrained weights: pinned revisions of the hub, licences, and torchxrayvision's pickles made into safetensors."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
import re
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ctx_distill.files import hash_file, hash_json, write_json
from ctx_distill.types import InputError

logger = logging.getLogger(__name__)

HUB = "hf-hub:"
PROVENANCE_FILE = "ctx_distill_source.json"
COMMIT = re.compile(r"[0-9a-f]{40}")
SAFE_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors", "README.md", "LICENSE*", "*/config.json")
OPEN_CLIP_PICKLE = "open_clip_pytorch_model.bin"

XRV_ALL_SHA256 = "56524913dd16a906422e8d8b66a7a5c46be1d82eb7ac012d8103776f1aa68899"
"""SHA-256 of densenet121-res224-all as released (28,382,008 bytes).

torchxrayvision publishes no checksum of its own; this is the value that several unrelated public projects pin for
`nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt` of its release v1.
"""


@dataclass(frozen=True)
class Provenance:
    """Where weights came from.

    Attributes:
        name: short name.
        source: folder or `hf-hub:organisation/name`.
        revision: commit, where known.
        license: of the model card, or "unknown".
    """

    name: str
    source: str
    revision: str | None
    license: str


def read_license(folder: Path) -> str:
    """The licence that a model card (README.md with YAML in front) names, or "unknown"."""
    import yaml

    card = folder / "README.md"
    if not card.is_file():
        return "unknown"
    front = re.match(r"\A---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        values = yaml.safe_load(front.group(1)) if front else None
    except yaml.YAMLError:
        return "unknown"
    if not isinstance(values, dict):
        return "unknown"
    named = values.get("license_name") if values.get("license") in (None, "other") else values.get("license")
    return str(named or values.get("license") or "unknown")


def read_provenance(folder: Path) -> Provenance:
    """Where a folder's weights came from: its own record, the hub cache's folder names, or nothing known."""
    record = folder / PROVENANCE_FILE
    if record.is_file():
        try:
            return Provenance(**json.loads(record.read_text()))
        except (json.JSONDecodeError, TypeError) as error:
            raise InputError(f"{record}: not readable ({error}). Delete it, or fetch the weights again.") from error
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})$", str(folder))
    if cached:
        organisation, name, revision = cached.groups()
        return Provenance(name, f"{HUB}{organisation}/{name}", revision, read_license(folder))
    return Provenance(folder.resolve().name, str(folder), None, read_license(folder))


def hash_weights(paths: Sequence[Path]) -> str:
    """One SHA-256 over weight files: the file's own where there is one, else over all of them in order of name."""
    hashes = {path.name: hash_file(path) for path in sorted(paths)}
    return next(iter(hashes.values())) if len(hashes) == 1 else hash_json(hashes)


def _hub_source(source: str, revision: str | None) -> tuple[str, str]:
    repository = source.removeprefix(HUB)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"{source}: not a repository of the hub. Expected {HUB}organisation/name.")
    if revision is None or not COMMIT.fullmatch(revision):
        raise InputError(
            f"{source}: revision {revision!r} is not pinned. A branch or a tag can change under you: give the full"
            f" commit (40 hexadecimal digits) from https://huggingface.co/{repository}/commits/main."
        )
    return repository, revision


def _snapshot(repository: str, revision: str, out: Path | None) -> Path:
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = list(SAFE_PATTERNS)
    try:
        if not any(name.endswith(".safetensors") for name in list_repo_files(repository, revision=revision)):
            patterns.append(OPEN_CLIP_PICKLE)
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled):
        patterns.append(OPEN_CLIP_PICKLE)  # no network: whatever the cache holds
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, local_dir=out))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise InputError(
            f"{HUB}{repository} at {revision}: not in the cache of huggingface_hub and not reachable"
            f" ({type(error).__name__}: {str(error).splitlines()[0]}). On a machine with internet run"
            f" `ctx-distill weights fetch {HUB}{repository} --revision {revision} --out FOLDER`, copy FOLDER here"
            " (or share HF_HOME), and give the folder as the expert."
        ) from error


def resolve_source(source: str, revision: str | None = None) -> Path:
    """The folder of a source: itself, or the snapshot of a pinned hub repository (fetched where it is missing).

    Raises:
        InputError: the folder does not exist, the revision is not pinned or another one, or nothing was reachable.
    """
    if source.startswith(HUB):
        return _snapshot(*_hub_source(source, revision), out=None)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"{source}: no such folder. Expected a folder with an expert's files, or {HUB}organisation/name with a"
            " revision. Fetch one with `ctx-distill weights fetch`, or train one with `make expert`."
        )
    own = read_provenance(folder).revision
    if revision is not None and own is not None and own != revision:
        raise InputError(f"{folder}: holds revision {own}, but {revision} was asked for. Fetch that one.")
    return folder


def find_text_config(folder: Path, name: str) -> Path:
    """The folder with the `config.json` of an open_clip text tower that is a Hugging Face model.

    Looked for in the expert's own folder (`NAME`, then the last part of `organisation/NAME`), then in the hub's
    cache or on the hub. Only the configuration is needed: the weights are the expert's.

    Raises:
        InputError: not found; the message says where it was looked for and how to place it.
    """
    places = [folder / name, folder / name.split("/")[-1]]
    for place in places:
        if (place / "config.json").is_file():
            return place
    reason = "it is not the name of a hub repository"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(name, "config.json")).parent
        except Exception as error:  # the hub's errors come from three libraries; all mean: not had
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    raise InputError(
        f"{folder / 'open_clip_config.json'}: the text tower is {name}, whose config.json (repository {name}, revision"
        f" main) is not in {places[-1]}, not in the cache of huggingface_hub and not reachable ({reason}). Place it at"
        f" {places[-1] / 'config.json'}, or run `ctx-distill weights fetch` on a machine with internet, which does so."
    )


def fetch(source: str, revision: str | None, out: Path | None = None) -> Provenance:
    """Download a hub repository at a pinned commit: configuration, tokenizer and weights, no code.

    Prints the licence, the folder and the expert's fingerprint. For machines without internet: fetch elsewhere with
    `out`, then copy the folder.

    Args:
        source: `hf-hub:organisation/name`.
        revision: full commit.
        out: folder to write; None for the cache of huggingface_hub.

    Raises:
        InputError: not pinned, not reachable, or not a model that this package can open.
    """
    from ctx_distill.models.xray_expert import open_expert

    repository, commit = _hub_source(source, revision)
    folder = _snapshot(repository, commit, out)
    record = Provenance(repository.split("/")[-1], f"{HUB}{repository}", commit, read_license(folder))
    config = folder / "open_clip_config.json"
    text = json.loads(config.read_text()).get("model_cfg", {}).get("text_cfg", {}) if config.is_file() else {}
    if text.get("hf_model_name"):
        found = find_text_config(folder, text["hf_model_name"]) / "config.json"
        place = folder / text["hf_model_name"].split("/")[-1] / "config.json"
        if out is not None and not place.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(found.read_bytes())
    if out is not None:
        write_json(folder / PROVENANCE_FILE, asdict(record))
    print(f"{record.source} at {commit}\nlicence      {record.license}\nfolder       {folder}")
    print(f"fingerprint  {open_expert(str(folder)).fingerprint()}")
    return record


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
