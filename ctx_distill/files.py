"""Hash files and values, and write files and folders atomically."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import time
import uuid
from pathlib import Path

REPLACE_S = 2.0
"""Seconds that a reader waits for a folder to be replaced in two steps before it restores the old folder."""


def hash_json(value: object) -> str:
    """Return the SHA-256 (hex) of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically: under a temporary name, then rename it. A failed write leaves no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id, which two nodes that share the file system may have in common.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically; raises `ValueError` for NaN, which JSON does not support."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def replace_folder(new: Path, place: Path) -> None:
    """Move a finished folder into place, replacing an existing one without a gap for readers.

    Linux exchanges the two folders in one step (`renameat2`). File systems without support, such as NFS, need two: the old
    folder first moves to `previous_folder(place)`. A reader between the two steps, or after a crash between them, calls
    `restore_folder`.

    Args:
        new: folder on the same file system; moved.
        place: destination; an existing folder is deleted.
    """
    if _exchange(new, place):
        shutil.rmtree(new)
        shutil.rmtree(previous_folder(place), ignore_errors=True)
        return
    previous = previous_folder(place)
    while True:
        try:
            new.rename(place)
            break
        except OSError:
            if not place.is_dir():
                raise
        # A reader that finds no folder may restore the old one, so both steps are repeated until they succeed.
        shutil.rmtree(previous, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            place.rename(previous)
    shutil.rmtree(previous, ignore_errors=True)


def previous_folder(place: Path) -> Path:
    """Return where `replace_folder` keeps the old folder between its two steps."""
    return place.with_name(f".{place.name}.previous")


def restore_folder(place: Path) -> None:
    """Wait for a two-step `replace_folder` before reading a folder; undo it if it was killed between its steps."""
    previous, end = previous_folder(place), time.monotonic() + REPLACE_S
    while not place.exists() and previous.exists():
        if time.monotonic() > end:
            with contextlib.suppress(OSError):  # another process was faster
                previous.rename(place)
            return
        time.sleep(0.01)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; return False if this is not supported or a path is missing."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    current_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap is not None and swap(
        current_folder, os.fsencode(first), current_folder, os.fsencode(second), exchange
    ) == 0  # fmt: skip
