"""Replace ids by keyed hashes and dates by relative days, to pseudonymise hospital data.

An unkeyed hash of a patient number can be reversed by trying all numbers. The key is stored in a separate file that is
not shared: with it a patient has the same pseudonym in every manifest, without it pseudonyms cannot be reversed.
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
    """Create pseudonyms from ids with a secret key.

    Args:
        key: the secret; None keeps the ids.
    """

    def __init__(self, key: bytes | None) -> None:
        self.key = key

    def name(self, kind: str, value: str) -> str:
        """Return `kind` (such as `p`) and 16 hex digits of HMAC-SHA256, or the id without a key."""
        if self.key is None:
            return value
        return kind + hmac.new(self.key, f"{kind}/{value}".encode(), hashlib.sha256).hexdigest()[:16]


def read_or_make_key(path: Path, output: Path) -> bytes:
    """Read the secret from a file, or create a random one that only its owner can read.

    Raises:
        InputError: the file is in the output's folder, or does not contain a key.
    """
    folder, key = output.resolve().parent, path.resolve()
    if folder == key.parent or folder in key.parents:
        raise InputError(
            f"{path}: the key is in the folder of {output} and would be shared with it; store it elsewhere, such as"
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
            f"{path}: not a key ({error}); expected {2 * KEY_BYTES} hex digits; remove the file to create a new key"
        ) from error
    if len(secret) < KEY_BYTES:
        raise InputError(
            f"{path}: key of {len(secret)} bytes; expected at least {KEY_BYTES}, remove the file to create a new key"
        )
    return secret


def days_since(first: date | None, this: date | None) -> int | None:
    """Return the days since a patient's first examination, or None if a date is missing."""
    return (this - first).days if first is not None and this is not None else None
