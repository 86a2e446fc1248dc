"""Read and write artefacts, the outputs of stages, as safetensors and JSON.

An artefact folder contains `artefact.json` (kind, fingerprint, upstream fingerprints, config), `model.safetensors`, and
additional files of its kind. It is written atomically. The fingerprint is a SHA-256 of config and weights, so equal
artefacts have equal fingerprints in any location.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctx_distill.errors import InputError
from ctx_distill.files import hash_file, hash_json, replace_folder, restore_folder, write_json
from ctx_distill.run_files import ARTEFACT_FILE

__all__ = [
    "Artefact",
    "Kind",
    "hash_file",
    "hash_json",
    "load_weights",
    "read_artefact",
    "require_same",
    "write_artefact",
    "write_json",
]

Kind = Literal["xray-expert", "xray-index", "ct-encoder", "dual-encoder", "classifier", "report-decoder"]
RECORD_ATTEMPTS = 10
"""Attempts to read a record, 10 ms apart, before the artefact counts as missing; it may be in the middle of a replacement."""
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Artefact:
    """An artefact read from disk.

    Attributes:
        folder: artefact folder.
        kind: kind of artefact.
        fingerprint: SHA-256 (hex) of config and weights.
        config: JSON values from which the model is built.
        upstream: fingerprint of each artefact or input that it depends on, by name ("xray-expert", ...).
    """

    folder: Path
    kind: Kind
    fingerprint: str
    config: dict[str, Any]
    upstream: dict[str, str] = field(default_factory=dict)

    def weights(self) -> dict[str, Tensor]:
        """Return all tensors on the CPU."""
        return dict(load_file(self.folder / WEIGHTS_FILE))


def write_artefact(
    folder: Path,
    kind: Kind,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    upstream: Mapping[str, str] | None = None,
    extra: Callable[[Path], None] | None = None,
) -> Artefact:
    """Write an artefact to a temporary folder and move it into place, so that readers always see an artefact.

    Args:
        folder: artefact folder.
        kind: kind of artefact.
        config: JSON values.
        tensors: weights, saved as safetensors.
        upstream: fingerprints of the inputs, by name.
        extra: function that adds files (a tokenizer, an index) to the temporary folder before the move.

    Returns:
        The artefact as read from disk.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    restore_folder(folder)
    for left in folder.parent.glob(f".{folder.name}.new-*"):  # from a writer that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        save_file(_unshared(tensors), temporary / WEIGHTS_FILE)
        if extra is not None:
            extra(temporary)
        fingerprint = hash_json({"kind": kind, "config": dict(config), "weights": hash_file(temporary / WEIGHTS_FILE)})
        record = {"kind": kind, "fingerprint": fingerprint, "upstream": dict(upstream or {}), "config": dict(config)}
        write_json(temporary / ARTEFACT_FILE, record)
        temporary.chmod(0o755)
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return read_artefact(folder, kind)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU with separate storage; copies only tensors that share storage."""
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    uses = Counter(value.untyped_storage().data_ptr() for value in on_cpu.values())
    return {
        name: value
        if uses[value.untyped_storage().data_ptr()] == 1 and value.untyped_storage().nbytes() == value.nbytes
        else value.clone()
        for name, value in on_cpu.items()
    }


def read_artefact(folder: Path, kind: Kind) -> Artefact:
    """Read an artefact's record.

    Raises:
        InputError: no artefact, a corrupt one, or one of another kind.
    """
    path = folder / ARTEFACT_FILE
    text = _read_record(folder)
    if text is None:
        raise InputError(
            f"{folder}: no {kind} artefact ({ARTEFACT_FILE} is missing). "
            "Run the stage that creates it, or pass another folder."
        )
    try:
        record = json.loads(text)
        artefact = Artefact(folder, record["kind"], record["fingerprint"], record["config"], record["upstream"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: corrupt artefact record ({error}). Run the stage that creates it again.") from error
    if artefact.kind != kind:
        raise InputError(
            f"{folder}: contains the artefact {artefact.kind}; expected {kind}. Pass the folder of an artefact {kind}."
        )
    return artefact


def _read_record(folder: Path) -> str | None:
    """Read an artefact's record, or return None if there is none; retries during a two-step `replace_folder`."""
    for attempt in range(RECORD_ATTEMPTS):
        if attempt:
            time.sleep(0.01)
        restore_folder(folder)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return (folder / ARTEFACT_FILE).read_text()
    return None


def require_same(first: str, first_fingerprint: str, second: str, second_fingerprint: str, remedy: str) -> None:
    """Check that two artefacts have equal fingerprints of a shared input.

    Raises:
        InputError: the fingerprints differ; the message names both artefacts.
    """
    if first_fingerprint != second_fingerprint:
        raise InputError(
            f"{first} and {second} do not match: {first_fingerprint[:12]} and {second_fingerprint[:12]}. {remedy}"
        )


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "", source: str = "weights") -> None:
    """Load the tensors with a prefix into a module, strictly.

    Raises:
        InputError: missing or unexpected keys, or different shapes; the message lists the first of each.
    """
    selected = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    expected = module.state_dict()
    missing = sorted(expected.keys() - selected.keys())
    unexpected = sorted(selected.keys() - expected.keys())
    shapes = sorted(
        f"{name} {tuple(selected[name].shape)} for {tuple(expected[name].shape)}"
        for name in selected.keys() & expected.keys()
        if selected[name].shape != expected[name].shape
    )
    if missing or unexpected or shapes:
        parts = [
            f"{len(items)} {problem}: {', '.join(items[:3])}"
            for problem, items in (("missing", missing), ("unexpected", unexpected), ("of different shape", shapes))
            if items
        ]
        raise InputError(
            f"{source}: weights do not fit {type(module).__name__} ({'; '.join(parts)}). "
            "Use the configuration of the training run."
        )
    module.load_state_dict(selected)
