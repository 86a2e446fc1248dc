"""Checkpoint files of a stage: written beside their place, proved, moved there; a torn one is passed over.

FOLDER/last.ckpt       the newest
FOLDER/previous.ckpt   the one before, until the next is proved
FOLDER/best.ckpt       weights of the lowest validation loss, where a stage selects them
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
"""Key under which a checkpoint holds what Lightning's own state lacks."""


@dataclass(frozen=True)
class Standing:
    """A checkpoint to go on from.

    Attributes:
        path: where it lies.
        step: optimiser steps that it holds.
    """

    path: Path
    step: int


class TornCheckpoint(Exception):
    """A file that is no whole checkpoint."""


def part_of(path: Path) -> Path:
    """The name under which a checkpoint is written before it is moved to its place."""
    return path.with_name(f".{path.name}.part")


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content, mapped into memory, after every byte was compared with its checksum.

    Raises:
        TornCheckpoint: it is not whole.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise TornCheckpoint(f"checksum of {bad}")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except TornCheckpoint:
        raise
    except Exception as error:  # a torn archive raises whatever its layer finds
        raise TornCheckpoint(f"{type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise TornCheckpoint(f"it holds {type(content).__name__}")
    return content


def settle(path: Path, keep: Path | None = None) -> None:
    """Prove what was written under `part_of(path)` and move it to its place.

    Args:
        path: the place.
        keep: where what stood there goes; None drops it.

    Raises:
        InputError: what was written cannot be read back; what stood before stands.
    """
    part = part_of(path)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    try:
        read(part)
    except TornCheckpoint as error:
        part.unlink(missing_ok=True)
        raise InputError(
            f"{path}: the checkpoint cannot be read back ({error}); the one before it stands. Check the disk."
        ) from error
    if keep is not None and path.exists():
        path.replace(keep)
    part.replace(path)


def standing(folder: Path, identity: Mapping[str, str | None]) -> Standing | None:
    """The newest whole checkpoint of a stage; a torn one is passed over with a word.

    Args:
        folder: of the checkpoints.
        identity: what the checkpoint must name as its own: its stage and request.

    Raises:
        InputError: the checkpoint is of another stage or of another request.
    """
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = read(path)
        except TornCheckpoint as error:
            print(f"{path}: not readable ({error}); passed over")
            continue
        _compare(path, content.get(OWN, {}).get("identity", {}), identity)
        return Standing(path, int(content["global_step"]))
    return None


def _compare(path: Path, found: Mapping[str, str | None], wanted: Mapping[str, str | None]) -> None:
    for what, value in wanted.items():
        if found.get(what) != value:
            raise InputError(
                f"{path}: a checkpoint of {what} {_short(found.get(what))}, but this run is of {what} {_short(value)}. Move it"
                " away, or give another --run; nothing was changed."
            )


def _short(value: str | None) -> str:
    return "none" if value is None else value[:40]
