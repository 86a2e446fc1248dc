"""Read scans from fsspec URLs (s3://, gs://, https://) by downloading them into a temporary folder."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctx_distill.data.io.volume import Volume, read_volume
from ctx_distill.errors import InputError

REMOTE = "://"
"""Separator that distinguishes a URL from a path."""


def read_remote(url: str) -> Volume:
    """Download and read a file or a folder of DICOM slices.

    Raises:
        InputError: the download failed, or `read_volume` rejects the file; the message names the URL.
    """
    with tempfile.TemporaryDirectory(prefix="ctx-distill-") as folder:
        local = Path(folder) / url.rstrip("/").rsplit("/", 1)[-1]
        try:
            system, path = _open(url)
            system.get(path, str(local), recursive=system.isdir(path))
        except InputError:
            raise
        except Exception as error:  # every file system defines its own errors
            raise InputError(f"{url}: download failed ({error}); check the URL and your permissions") from error
        try:
            return replace(read_volume(local), path=Path(url))
        except InputError as error:
            raise InputError(str(error).replace(str(local), url)) from error


def remote_stamp(url: str) -> dict[str, object]:
    """Return what identifies the file's version: its size, and a tag or time if the file system provides one.

    Raises:
        InputError: the file system does not return information about the URL.
    """
    try:
        system, path = _open(url)
        facts = [system.info(path)] if not system.isdir(path) else [system.info(p) for p in system.find(path)]
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{url}: cannot access it ({error}); check the URL and your permissions") from error
    tags = sorted(str(f.get("ETag") or f.get("etag") or f.get("LastModified") or f.get("mtime") or "") for f in facts)
    return {"bytes": sum(int(f.get("size") or 0) for f in facts), "tags": tags}


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise InputError(f"{url}: {error}; for s3:// install the extra: pip install ctx-distill[s3]") from error
    except ValueError as error:
        raise InputError(f"{url}: {error}; expected a URL that fsspec supports, such as s3://bucket/folder") from error
    return system, str(path)
