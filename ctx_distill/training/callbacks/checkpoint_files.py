"""Checkpoint files of a stage: written to a temporary file, verified and renamed; corrupt ones are skipped.

FOLDER/last.ckpt       the newest checkpoint
FOLDER/previous.ckpt   the one before, until the next one is verified
FOLDER/best.ckpt       weights of the lowest validation loss, if the stage selects them
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctx_distill.errors import InputError

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
OWN = "ctx_distill"
"""Key of the state that is not part of Lightning's checkpoint."""


@dataclass(frozen=True)
class Standing:
    """A checkpoint to resume from.

    Attributes:
        path: Path of the file.
        step: Optimiser steps at the checkpoint.
    """

    path: Path
    step: int


class TornCheckpoint(Exception):
    """A file that is not a complete checkpoint."""


def part_of(path: Path) -> Path:
    """Return the temporary name under which a checkpoint is written."""
    return path.with_name(f".{path.name}.part")


def read(path: Path) -> dict[str, Any]:
    """Verify the checksums of a checkpoint, and return its content, memory-mapped.

    Raises:
        TornCheckpoint: The file is truncated or corrupt.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise TornCheckpoint(f"wrong checksum of {bad}")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except TornCheckpoint:
        raise
    except Exception as error:  # a corrupt archive can raise any exception
        raise TornCheckpoint(f"{type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise TornCheckpoint(f"expected a dict, got {type(content).__name__}")
    return content


def settle(path: Path, keep: Path | None = None) -> None:
    """Verify the file written to `part_of(path)` and rename it to `path`.

    Args:
        path: Final path of the checkpoint.
        keep: New path of the file that is replaced; None deletes it.

    Raises:
        InputError: The written file cannot be read back; the previous file is unchanged.
    """
    part = part_of(path)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    try:
        read(part)
    except TornCheckpoint as error:
        part.unlink(missing_ok=True)
        raise InputError(
            f"{path}: the checkpoint cannot be read back ({error}); the previous one is unchanged. Check the disk."
        ) from error
    if keep is not None and path.exists():
        path.replace(keep)
    part.replace(path)


def standing(folder: Path, identity: Mapping[str, str | None]) -> Standing | None:
    """Return the newest complete checkpoint of a stage; a corrupt one is skipped with a message.

    Args:
        folder: Folder of the checkpoints.
        identity: Stage and request key that the checkpoint must have.

    Returns:
        The checkpoint, or None if there is none.

    Raises:
        InputError: The checkpoint belongs to another stage or request.
    """
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = read(path)
        except TornCheckpoint as error:
            print(f"{path}: not readable ({error}); skipped")
            continue
        _compare(path, content.get(OWN, {}).get("identity", {}), identity)
        return Standing(path, int(content["global_step"]))
    return None


def _compare(path: Path, actual: Mapping[str, str | None], expected: Mapping[str, str | None]) -> None:
    for what, value in expected.items():
        if actual.get(what) != value:
            raise InputError(
                f"{path}: a checkpoint of {what} {_short(actual.get(what))}, but this run is of {what} {_short(value)}. Move"
                " it away, or give another --run; nothing was changed."
            )


def _short(value: str | None) -> str:
    return "none" if value is None else value[:40]
