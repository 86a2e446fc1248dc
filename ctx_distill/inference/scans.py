"""The scans of a command: a file, a folder of DICOM slices, a folder of either, or a manifest."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.progress import track

from ctx_distill import signals
from ctx_distill.data.io.scan_file import ScanFile
from ctx_distill.data.io.volume import SUFFIXES
from ctx_distill.errors import InputError
from ctx_distill.progress import LogLine

T = TypeVar("T")
TABLES = (".csv", ".parquet")


@dataclass(frozen=True)
class Scan:
    """One scan.

    Attributes:
        name: unique name: the image_id of the manifest, else the path below the given folder.
        study: the study_id of the manifest, else "".
        file: the file, with what the manifest states about it.
    """

    name: str
    study: str
    file: ScanFile

    @property
    def slug(self) -> str:
        """Return the name as one part of a path."""
        return re.sub(r"[^\w.-]+", "_", self.name).strip(".") or "scan"


def find_scans(given: Path) -> list[Scan]:
    """Return all scans of a file, folder or manifest, ordered by name; those of a manifest in its order.

    The scans are not opened, and the images of a manifest need not exist.

    Raises:
        InputError: the path does not exist, the folder has no scans, or the manifest is not valid.
    """
    if given.suffix.lower() in TABLES and given.is_file():
        from ctx_distill.data.manifests.manifest import read_manifest  # brings pandas

        manifest = read_manifest(given, check_images=False)
        frame = manifest.frame
        return [
            Scan(str(frame.at[row, "image_id"]), str(frame.at[row, "study_id"]), manifest.scan_file(row))
            for row in frame.index
        ]
    if given.is_dir() and not _is_dicom_folder(given):
        found = [Scan(path.relative_to(given).as_posix(), "", ScanFile(path)) for path in sorted(_below(given))]
        if not found:
            raise InputError(
                f"{given}: no scans in this folder. Expected {', '.join(SUFFIXES)} files, or folders of DICOM slices."
            )
        return found
    if not given.exists():
        raise InputError(f"{given}: no such file or folder. Expected a scan, a folder of DICOM slices, or a manifest.")
    return [Scan(given.name or given.resolve().name, "", ScanFile(given))]


def with_progress(items: Sequence[T]) -> Iterator[T]:
    """Yield the items and show progress: a bar on a terminal, a line now and then in a log.

    Raises:
        StopRequested: a signal asked to stop; raised between two items.
    """
    log = LogLine("  scans", len(items))
    for item in track(items, description="  scans", disable=not sys.stdout.isatty()):
        if signals.requested() is not None:
            raise signals.StopRequested("between scans")
        yield item
        log.advance()


def _below(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if _is_dicom_folder(path):
                yield path
            else:
                yield from _below(path)
        elif path.name.lower().endswith(SUFFIXES):
            yield path


def _is_dicom_folder(folder: Path) -> bool:
    """Return whether a file of the folder is DICOM, by its name or its magic number (128 bytes, then DICM)."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            if path.suffix.lower() in (".dcm", ".ima"):
                return True
            if not path.name.lower().endswith(SUFFIXES):
                with path.open("rb") as file:
                    if file.read(132)[128:] == b"DICM":
                        return True
    return False
