"""Artefacts: what one stage hands to the next, as safetensors and JSON, written whole or not at all.

An artefact folder holds `artefact.json` (kind, fingerprint, upstream fingerprints, config), `model.safetensors`, and
whatever files its kind adds. The fingerprint is a SHA-256 over config and weights, so equal artefacts have equal
fingerprints wherever they lie.
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
"""Reads of a record, 10 ms apart, before the artefact counts as missing: it may be replaced in two steps at that moment."""
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Artefact:
    """An artefact read from disk.

    Attributes:
        folder: where it lies.
        kind: what it is.
        fingerprint: SHA-256 (hex) of its config and weights.
        config: plain JSON values to build it again.
        upstream: fingerprint of each artefact or input that it was made from, by name ("xray-expert", ...).
    """

    folder: Path
    kind: Kind
    fingerprint: str
    config: dict[str, Any]
    upstream: dict[str, str] = field(default_factory=dict)

    def weights(self) -> dict[str, Tensor]:
        """All tensors, on the CPU."""
        return dict(load_file(self.folder / WEIGHTS_FILE))


def write_artefact(
    folder: Path,
    kind: Kind,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    upstream: Mapping[str, str] | None = None,
    extra: Callable[[Path], None] | None = None,
) -> Artefact:
    """Write an artefact beside its place and move it there; at no moment is there none where there was one before.

    Args:
        folder: the artefact's folder.
        kind: what it is.
        config: plain JSON values.
        tensors: the weights, saved as safetensors.
        upstream: fingerprints of what it was made from.
        extra: called with the temporary folder to add more files (a tokenizer, an index) before the move.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    restore_folder(folder)
    for left in folder.parent.glob(f".{folder.name}.new-*"):  # of a writer that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        save_file(_apart(tensors), temporary / WEIGHTS_FILE)
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


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none in another's storage; without a copy where that is so, as in a large index."""
    own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    uses = Counter(value.untyped_storage().data_ptr() for value in own.values())
    return {
        name: value
        if uses[value.untyped_storage().data_ptr()] == 1 and value.untyped_storage().nbytes() == value.nbytes
        else value.clone()
        for name, value in own.items()
    }


def read_artefact(folder: Path, kind: Kind) -> Artefact:
    """Read an artefact's record.

    Raises:
        InputError: the folder holds no artefact, a torn one, or one of another kind.
    """
    path = folder / ARTEFACT_FILE
    text = _read_record(folder)
    if text is None:
        raise InputError(
            f"{folder}: no {kind} artefact here ({ARTEFACT_FILE} is missing). "
            "Run the stage that makes it, or give the folder of one."
        )
    try:
        record = json.loads(text)
        artefact = Artefact(folder, record["kind"], record["fingerprint"], record["config"], record["upstream"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a readable artefact record ({error}). Run the stage that makes it again."
        ) from error
    if artefact.kind != kind:
        raise InputError(
            f"{folder}: holds a {artefact.kind} artefact, but a {kind} is needed here. Give the folder of a {kind}."
        )
    return artefact


def _read_record(folder: Path) -> str | None:
    """Read an artefact's record, None where there is none; `replace_folder` may be at work on a file system without exchange."""
    for attempt in range(RECORD_ATTEMPTS):
        if attempt:
            time.sleep(0.01)
        restore_folder(folder)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return (folder / ARTEFACT_FILE).read_text()
    return None


def require_same(first: str, first_fingerprint: str, second: str, second_fingerprint: str, remedy: str) -> None:
    """Check that two artefacts agree on something that both name.

    Raises:
        InputError: they disagree; the message names both.
    """
    if first_fingerprint != second_fingerprint:
        raise InputError(
            f"{first} and {second} disagree: {first_fingerprint[:12]} against {second_fingerprint[:12]}. {remedy}"
        )


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "", source: str = "weights") -> None:
    """Load the tensors under a prefix into a module, strictly.

    Raises:
        InputError: keys are missing or left over, or shapes differ; the message lists the first of each.
    """
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    expected = module.state_dict()
    missing = sorted(expected.keys() - own.keys())
    left_over = sorted(own.keys() - expected.keys())
    shapes = sorted(
        f"{name} {tuple(own[name].shape)} for {tuple(expected[name].shape)}"
        for name in own.keys() & expected.keys()
        if own[name].shape != expected[name].shape
    )
    if missing or left_over or shapes:
        parts = [
            f"{len(items)} {what}: {', '.join(items[:3])}"
            for what, items in (("missing", missing), ("left over", left_over), ("of another shape", shapes))
            if items
        ]
        raise InputError(
            f"{source}: weights do not fit {type(module).__name__} ({'; '.join(parts)}). "
            "Use the configuration that they were trained with."
        )
    module.load_state_dict(own)
