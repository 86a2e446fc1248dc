"""Wheels for a machine without a network: `make gpu-wheels` collects them here, `gpu_report.py` installs them there.

    FOLDER/base/                what the package imports and the machine lacks
    FOLDER/simpleitk/           DICOM, NRRD and MetaImage; the report itself does without it
    FOLDER/faiss-gpu-1/ ...     pieces of FAISS for GPUs

Each folder holds at most `FOLDER_BYTES`, so that it travels in one transfer. A wheel that is larger is cut into pieces; a
`pieces.json` beside them says how long the wheel is and what its SHA-256 is, and it is joined only where both agree.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
FOLDER_BYTES = 54_000_000
"""A transfer takes 64 MiB, the working tree (7 MB) included."""
SETS = {"base": "gpu-wheels.txt", "faiss-gpu": "gpu-faiss.txt"}
APART = {"simpleitk": ["simpleitk"]}
"""Wheels of the set `base` that travel in a folder of their own."""
PLATFORMS = [
    *(f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17)),
    "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64",
]  # fmt: skip
PIECES = "pieces.json"


def requirements_of(text: str) -> dict[str, str]:
    """Entries of a hashed requirements file by name: `name==version` with its hashes."""
    entries: dict[str, str] = {}
    for entry in re.split(r"\n(?=[a-z0-9])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)):
        if "==" in entry:
            entries[entry.split("==")[0].strip().split("[")[0]] = entry.strip() + "\n"
    return entries


def download(folder: Path, sets: Iterable[str] = tuple(SETS)) -> None:
    """Fill `folder` with the wheels of the sets: hash-checked, for CPython 3.12 on x86-64 Linux.

    Args:
        folder: that `make gpu-wheels` fills.
        sets: names of `SETS`.

    Raises:
        SystemExit: pip could not fetch one, or the folder would not fit a transfer.
    """
    for name in sets:
        whole = folder / "all" / name
        whole.mkdir(parents=True, exist_ok=True)
        entries = requirements_of((REQUIREMENTS / SETS[name]).read_text())
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        _pip(["download", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", *platforms,
              "--dest", str(whole)], entries, whole)  # fmt: skip
        _sort(name, whole, folder)
    for part in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "all"):
        total = sum(path.stat().st_size for path in part.iterdir())
        print(f"{part}: {len(list(part.iterdir()))} files, {total / 1e6:.1f} MB")
        if total > FOLDER_BYTES:
            raise SystemExit(f"{part}: {total:,} bytes; at most {FOLDER_BYTES:,} fit a transfer. Put a wheel apart.")
    shutil.rmtree(folder / "all")


def _pip(words: list[str], entries: dict[str, str], folder: Path) -> None:
    wanted = folder / "requirements.txt"
    wanted.write_text("".join(entries.values()))
    pip = [
        sys.executable,
        "-m",
        "pip",
        words[0],
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "-r",
        str(wanted),
        *words[1:],
    ]
    done = subprocess.run(pip)
    wanted.unlink()
    if done.returncode:
        raise SystemExit(f"pip {words[0]} failed with {done.returncode}; see above")


def _sort(name: str, whole: Path, folder: Path) -> None:
    for old in [folder / name, *folder.glob(f"{name}-[0-9]*"), *(folder / apart for apart in APART)]:
        if old.exists() and (old.name not in APART or name == "base"):
            shutil.rmtree(old)
    wheels = sorted(whole.glob("*.whl"))
    if name != "base":
        split(wheels, folder, name)
        return
    for wheel in wheels:
        distribution = wheel.name.split("-")[0].lower().replace("_", "-")
        target = folder / next((apart for apart, names in APART.items() if distribution in names), name)
        target.mkdir(exist_ok=True)
        shutil.copy2(wheel, target)


def split(wheels: list[Path], folder: Path, name: str, size: int = FOLDER_BYTES - 10_000) -> list[Path]:
    """Cut wheels into `folder/name-1`, `folder/name-2`, ..., each filled up to `size` bytes.

    Args:
        wheels: files to cut.
        folder: where the folders go.
        name: of the set.
        size: bytes of pieces in a folder.

    Returns:
        The folders.
    """
    folders: list[Path] = []
    room = 0
    listing: dict[str, dict[str, object]] = {}
    for wheel in wheels:
        data = memoryview(wheel.read_bytes())
        listing[wheel.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        start = 0
        while start < len(data):
            if room == 0:
                folders.append(folder / f"{name}-{len(folders) + 1}")
                folders[-1].mkdir(parents=True)
                room = size
            piece = data[start : start + room]
            (folders[-1] / f"{wheel.name}.at-{start:012d}").write_bytes(piece)
            start, room = start + len(piece), room - len(piece)
    for each in folders:
        (each / PIECES).write_text(json.dumps(listing, indent=1))
    return folders


def missing_pieces(folder: Path, name: str) -> str:
    """What is missing before `join` can run, in words; empty where all pieces are there.

    Args:
        folder: the wheels' folder.
        name: of the set.
    """
    listings = sorted(folder.glob(f"{name}-[0-9]*/{PIECES}"))
    if not listings:
        return f"no {name}-* folder in {folder}"
    short = []
    for wheel, facts in json.loads(listings[0].read_text()).items():
        there = sum(path.stat().st_size for path in _pieces(folder, name, wheel))
        if there != facts["bytes"]:
            short.append(f"{wheel}: {there:,} of {facts['bytes']:,} bytes")
    return "; ".join(short)


def _pieces(folder: Path, name: str, wheel: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-[0-9]*/{wheel}.at-*"), key=lambda path: path.name)


def join(folder: Path, name: str, target: Path) -> list[Path]:
    """Put the pieces of a set together again.

    Args:
        folder: the wheels' folder.
        name: of the set.
        target: where the wheels go.

    Returns:
        The wheels.

    Raises:
        ValueError: pieces are missing, or a wheel is not the one that was cut; nothing of it is left in `target`.
    """
    if short := missing_pieces(folder, name):
        raise ValueError(f"{folder}: {short}; carry the other folders over too")
    listing = json.loads(next(iter(folder.glob(f"{name}-[0-9]*/{PIECES}"))).read_text())
    target.mkdir(parents=True, exist_ok=True)
    wheels = []
    for wheel, facts in listing.items():
        whole, digest = target / wheel, hashlib.sha256()
        partial = whole.with_name(f"{wheel}.partial")
        with partial.open("wb") as out:
            for piece in _pieces(folder, name, wheel):
                data = piece.read_bytes()
                digest.update(data)
                out.write(data)
        if digest.hexdigest() != facts["sha256"]:
            partial.unlink()
            raise ValueError(
                f"{wheel}: SHA-256 {digest.hexdigest()}, expected {facts['sha256']}; carry its pieces over again"
            )
        partial.replace(whole)
        wheels.append(whole)
    return wheels


def install(wheels: list[Path], target: Path) -> bool:
    """Unpack wheels into a folder for PYTHONPATH, unless exactly these were unpacked there before.

    Args:
        wheels: files.
        target: folder.

    Returns:
        Whether anything was done.

    Raises:
        SystemExit: pip failed.
    """
    stamp = target / "installed.json"
    wanted = json.dumps(sorted([wheel.name, wheel.stat().st_size] for wheel in wheels))
    if stamp.is_file() and stamp.read_text() == wanted:
        return False
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir",
           "--disable-pip-version-check", "--target", str(target), *map(str, wheels)]  # fmt: skip
    done = subprocess.run(pip)
    if done.returncode:
        raise SystemExit(f"pip install of {len(wheels)} wheels failed with {done.returncode}; see above")
    stamp.write_text(wanted)
    return True
