"""The run's seed (`seed_everything`) and the seeds derived from it."""

from __future__ import annotations

import hashlib
import os

VARIABLE = "PL_GLOBAL_SEED"
"""The environment variable that Lightning's `seed_everything` sets, in every process of a run."""


def run_seed() -> int:
    """Return the seed of the run, or 0 if none was set."""
    return int(os.environ.get(VARIABLE, "0"))


def seed_of(*parts: object) -> int:
    """Return the seed of one random draw.

    Args:
        parts: identifiers of the draw, such as epoch, manifest row and a name. Never use the rank or the position in a
            batch, so that the draw does not depend on the world size or on interruptions.

    Returns:
        56 bits of a hash of the run's seed and the parts.
    """
    text = " ".join(str(part) for part in (run_seed(), *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
