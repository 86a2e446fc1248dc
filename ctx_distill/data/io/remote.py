"""Scans at an fsspec address (s3://, gs://, https://): fetched whole into a temporary folder, read, and gone again."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctx_distill.data.io.volume import Volume, read_volume
from ctx_distill.errors import InputError

REMOTE = "://"
"""What tells an address from a path."""


def read_remote(url: str) -> Volume:
    """A file, or a folder of DICOM slices, as `read_volume` reads it.

    Raises:
        InputError: it cannot be fetched, or what `read_volume` refuses; the message names the address.
    """
    with tempfile.TemporaryDirectory(prefix="ctx-distill-") as folder:
        local = Path(folder) / url.rstrip("/").rsplit("/", 1)[-1]
        try:
            system, path = _open(url)
            system.get(path, str(local), recursive=system.isdir(path))
        except InputError:
            raise
        except Exception as error:  # every file system has errors of its own
            raise InputError(f"{url}: cannot be fetched ({error}); check the address and your rights there") from error
        try:
            return replace(read_volume(local), path=Path(url))
        except InputError as error:
            raise InputError(str(error).replace(str(local), url)) from error


def remote_stamp(url: str) -> dict[str, object]:
    """What tells whether the file changed: its size, and a tag or time where the file system gives one.

    Raises:
        InputError: it cannot be looked at.
    """
    try:
        system, path = _open(url)
        facts = [system.info(path)] if not system.isdir(path) else [system.info(p) for p in system.find(path)]
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{url}: cannot be looked at ({error}); check the address and your rights there") from error
    tags = sorted(str(f.get("ETag") or f.get("etag") or f.get("LastModified") or f.get("mtime") or "") for f in facts)
    return {"bytes": sum(int(f.get("size") or 0) for f in facts), "tags": tags}


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise InputError(f"{url}: {error}; for s3:// install the extra: pip install ctx-distill[s3]") from error
    except ValueError as error:
        raise InputError(
            f"{url}: {error}; expected an address that fsspec knows, such as s3://bucket/folder"
        ) from error
    return system, str(path)
