"""The run's one seed, `seed_everything`, and the seeds that everything drawn in training gets from it."""

from __future__ import annotations

import hashlib
import os

VARIABLE = "PL_GLOBAL_SEED"
"""The environment variable that Lightning's `seed_everything` sets, in every process of a run."""


def run_seed() -> int:
    """Return the seed of the run; 0 where nothing was seeded."""
    return int(os.environ.get(VARIABLE, "0"))


def seed_of(*parts: object) -> int:
    """Return the seed of one draw.

    Args:
        parts: what the draw is for and of, such as the epoch, the manifest row and a name. Never the rank or the place in
            a batch: then what is drawn does not depend on the world size, or on whether the run was stopped.

    Returns:
        56 bits of a hash of the run's seed and the parts.
    """
    text = " ".join(str(part) for part in (run_seed(), *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
