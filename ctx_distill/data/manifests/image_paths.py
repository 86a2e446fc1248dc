"""Check that a manifest's image paths stay in its folder and can be opened, without decoding images."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ctx_distill.data.io.remote import REMOTE

# First bytes by suffix, to distinguish images from saved error pages or Git LFS pointers.
_MAGIC: dict[str, tuple[bytes, ...]] = {
    ".gz": (b"\x1f\x8b",),
    ".png": (b"\x89PNG",),
    ".jpg": (b"\xff\xd8",),
    ".jpeg": (b"\xff\xd8",),
    ".nrrd": (b"NRRD",),
}
_WINDOWS_OR_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")  # C:\..., file://, s3://
# Files are opened in threads: on a network disk each open takes a millisecond, and a manifest has 50,000 files.
_THREADS = 8
_SLICE = 2048
"""Paths per future: one future per path would take a kilobyte each."""


def path_fault(image_path: str) -> tuple[str, str] | None:
    """Check a path as text; return (what was found, what to do), or None for a clean relative path."""
    if not image_path:
        return "nothing", "expected a path relative to the manifest's folder"
    if "\0" in image_path:
        return "a NUL character", "expected a path relative to the manifest's folder"
    if image_path.startswith(("/", "\\", "~")) or _WINDOWS_OR_URL.match(image_path):
        return f"the absolute path {image_path!r}", "expected a path relative to the manifest's folder"
    if Path(os.path.normpath(image_path)).parts[0] == "..":
        return f"{image_path!r}, which leaves the manifest's folder", "put the manifest above its images"
    return None


def file_faults(folder: Path, image_paths: Sequence[str]) -> list[tuple[str, str] | None]:
    """Check on disk that each path stays in `folder` after resolving links, and can be opened; same order."""
    root = os.path.realpath(folder)
    # Parents repeat; resolving each once takes only seconds for a million rows.
    parents = {os.path.dirname(path) for path in image_paths}  # noqa: PTH120
    resolved = {parent: os.path.realpath(os.path.join(root, parent)) for parent in parents}  # noqa: PTH118

    def fault(image_path: str) -> tuple[str, str] | None:
        parent, name = os.path.split(image_path)
        full = f"{resolved[parent]}{os.sep}{name}"
        if name in ("..", ".", "") or os.path.islink(full):  # noqa: PTH114
            full = os.path.realpath(full)
        if not _inside(full, root):
            return _leaves(image_path, full)
        return _open_fault(image_path, full, root)

    def faults(start: int) -> list[tuple[str, str] | None]:
        return [fault(image_path) for image_path in image_paths[start : start + _SLICE]]

    with ThreadPoolExecutor(_THREADS) as pool:
        return [one for part in pool.map(faults, range(0, len(image_paths), _SLICE)) for one in part]


def all_listed(folder: Path, roots: Sequence[str], image_paths: Sequence[str]) -> bool:
    """Return whether every path still exists, with one listing per folder; for images that were opened before.

    Args:
        folder: folder of the manifest.
        roots: N roots ("" for `folder`); remote roots are not checked.
        image_paths: N clean relative paths.
    """
    names_by_folder: dict[tuple[str, str], set[str]] = {}
    for root, image_path in zip(roots, image_paths, strict=True):
        if REMOTE not in root:
            parent, _, name = image_path.rpartition("/")  # three times as fast as os.path.split
            names_by_folder.setdefault((root, parent), set()).add(name)
    try:
        return all(
            names <= set(os.listdir(folder / root / parent))  # noqa: PTH208
            for (root, parent), names in names_by_folder.items()
        )
    except OSError:
        return False


def faults_by_place(
    folder: Path, roots: Sequence[str], image_paths: Sequence[str]
) -> tuple[dict[int, tuple[str, str]], dict[int, str]]:
    """Return the faults of `file_faults` by position, for paths with individual roots ("" for `folder`).

    Returns:
        Faults by position, and each root that is not a folder at its first position; its images are not checked.
    """
    faults: dict[int, tuple[str, str]] = {}
    no_folders: dict[int, str] = {}
    places_of: dict[str, list[int]] = {}
    for place, root in enumerate(roots):
        places_of.setdefault(root, []).append(place)
    for root, places in places_of.items():
        if REMOTE in root:  # checked when it is read: 50,000 requests would take too long
            continue
        if root and not (folder / root).is_dir():
            no_folders[places[0]] = root
            continue
        root_faults = file_faults(folder / root, [image_paths[place] for place in places])
        faults |= {place: fault for place, fault in zip(places, root_faults, strict=True) if fault}
    return faults, no_folders


def _inside(full: str, root: str) -> bool:
    return full == root or full.startswith(root.rstrip(os.sep) + os.sep)


def _leaves(image_path: str, full: str) -> tuple[str, str]:
    return (
        f"{image_path!r}, which leads to {full}, outside the manifest's folder",
        "move the images (not links to them) under the manifest's folder, or the manifest above them",
    )


def _open_fault(image_path: str, full: str, root: str) -> tuple[str, str] | None:
    try:
        file = os.open(full, os.O_RDONLY)  # three times as fast as `open`
        try:
            head = os.read(file, 16)
        finally:
            os.close(file)
    except IsADirectoryError:
        return _folder_fault(image_path, full, root)
    except FileNotFoundError:
        hint = "write / between folders" if "\\" in image_path else "correct the path or remove the row"
        return f"{image_path!r}, which does not exist", hint
    except PermissionError:
        return f"{image_path!r}, which is not readable", "give this user read permission"
    except OSError as error:
        return f"{image_path!r}, which cannot be opened ({error.strerror})", "correct the path or restore the file"
    if not head:
        return f"{image_path!r}, an empty file", "restore the file or remove the row"
    expected = _MAGIC.get(os.path.splitext(full)[1].lower())  # noqa: PTH122
    if expected and not head.startswith(expected):
        suffix = os.path.splitext(full)[1]  # noqa: PTH122
        return (
            f"{image_path!r}, which starts with {head[:8]!r} and is not a {suffix} file",
            "restore the file or its suffix",
        )
    return None


def _folder_fault(image_path: str, full: str, root: str) -> tuple[str, str] | None:
    try:
        with os.scandir(full) as scanned:
            entries = list(scanned)
        for entry in entries:
            if entry.is_symlink() and not _inside(target := os.path.realpath(entry.path), root):
                return _leaves(f"{image_path}/{entry.name}", target)
        if not any(entry.is_file() for entry in entries):
            return f"the folder {image_path!r} without files", "expected a file, or a folder of DICOM slices"
    except OSError as error:
        return f"the folder {image_path!r}, which cannot be opened ({error.strerror})", "give this user read permission"
    return None
