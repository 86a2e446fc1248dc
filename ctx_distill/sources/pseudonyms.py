"""Keyed hashes in place of ids, and days in place of dates: what a manifest may show of a hospital's patients.

An unkeyed hash of a patient number is undone by trying all numbers. The key is a file of its own, outside of what is
given away; with it the same patient gets the same name in every manifest, without it nobody gets back.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from datetime import date
from pathlib import Path

from ctx_distill.errors import InputError

KEY_BYTES = 32


class Pseudonyms:
    """Names made from ids with a secret key.

    Args:
        key: the secret; None keeps ids as they are.
    """

    def __init__(self, key: bytes | None) -> None:
        self.key = key

    def name(self, kind: str, value: str) -> str:
        """A name for an id: `kind` (such as `p`) and 16 hex digits of HMAC-SHA256; the id itself without a key."""
        if self.key is None:
            return value
        return kind + hmac.new(self.key, f"{kind}/{value}".encode(), hashlib.sha256).hexdigest()[:16]


def read_or_make_key(path: Path, output: Path) -> bytes:
    """The secret in a file, made at random where there is none, readable by its owner alone.

    Raises:
        InputError: it lies in the output's folder, or is not such a secret.
    """
    folder, key = output.resolve().parent, path.resolve()
    if folder == key.parent or folder in key.parents:
        raise InputError(
            f"{path}: the key lies in the folder of {output}, and would be given away with it; put it elsewhere, such as"
            " ~/.config/ctx-distill/key"
        )
    if not key.exists():
        key.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(KEY_BYTES) + "\n")
    try:
        secret = bytes.fromhex(key.read_text().strip())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not a key ({error}); expected {2 * KEY_BYTES} hex digits, or no file to make one"
        ) from error
    if len(secret) < KEY_BYTES:
        raise InputError(f"{path}: a key of {len(secret)} bytes; expected {KEY_BYTES} or more, remove it to make one")
    return secret


def days_since(first: date | None, this: date | None) -> int | None:
    """Whole days from a patient's first examination; None where a date is missing."""
    return (this - first).days if first is not None and this is not None else None
