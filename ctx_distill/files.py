"""Hashes of files and values, and files and folders that are written completely or not at all."""

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
"""Seconds that a reader waits for a folder that is being replaced in two steps before it puts the old one back."""


def hash_json(value: object) -> str:
    """SHA-256 (hex) of a JSON value; key order does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file under a temporary name and rename it: a reader never sees half of it, and a full disk leaves none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: two nodes that share the file system may have the same one.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, whole or not at all; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def replace_folder(new: Path, place: Path) -> None:
    """Move a finished folder to a place where another one may be, so that at no moment there is none to read.

    Linux exchanges the two in one step (`renameat2`). File systems that cannot, such as NFS, take two: the old folder goes
    to `previous_folder(place)` first. A reader that comes between them, or after a crash between them, calls
    `restore_folder`.

    Args:
        new: beside the place, on the same file system; gone afterwards.
        place: where it goes; what is there is deleted.
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
        # A reader that meets no folder may put the old one back, so both steps are tried until they succeed.
        shutil.rmtree(previous, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            place.rename(previous)
    shutil.rmtree(previous, ignore_errors=True)


def previous_folder(place: Path) -> Path:
    """Where `replace_folder` puts the old folder for the moment between its two steps."""
    return place.with_name(f".{place.name}.previous")


def restore_folder(place: Path) -> None:
    """Before a folder is read: wait for a `replace_folder` that is between its two steps; undo one that was killed there."""
    previous, end = previous_folder(place), time.monotonic() + REPLACE_S
    while not place.exists() and previous.exists():
        if time.monotonic() > end:
            with contextlib.suppress(OSError):  # someone else was faster
                previous.rename(place)
            return
        time.sleep(0.01)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; False where the system or the file system cannot, or one of them is missing."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    current_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap is not None and swap(
        current_folder, os.fsencode(first), current_folder, os.fsencode(second), exchange
    ) == 0  # fmt: skip
