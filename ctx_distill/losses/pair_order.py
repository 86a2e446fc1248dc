"""A total order of pairs of studies that depends only on their evidence and their study ids.

Pairs with equal evidence are common: two normal reports agree exactly. If only some of them can be chosen, ties must not
be broken by the position in the batch, which differs between ranks, epochs and world sizes. They are broken by a hash of
the two study ids, which is the same for (i, j) and (j, i).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

STEPS = 1_000_000
"""Evidence is compared in steps of 1e-6; smaller differences are rounding noise, which depends on the batch."""
HASH_BITS = 43
"""Bits of a pair's hash, next to the 20 bits of its evidence, in a non-negative int64."""
_HASH_MASK = (1 << HASH_BITS) - 1
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
"""Shifts and multipliers of splitmix64, the latter as signed integers (Steele et al. 2014)."""
_BLOCK = {"cpu": 1 << 17, "cuda": 1 << 22}
"""Pairs hashed at once: what fits into a core's cache, and what keeps a GPU busy."""


def study_identity(study_ids: Sequence[str]) -> Tensor:
    """Return a stable 64-bit hash of each study id, independent of the position in the manifest.

    Args:
        study_ids: N ids; equal ids give equal hashes.

    Returns:
        (N,) int64 on the CPU.
    """
    known: dict[str, int] = {}
    for name in study_ids:
        if name not in known:
            digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
            known[name] = int.from_bytes(digest, "big", signed=True)
    return torch.tensor([known[name] for name in study_ids], dtype=torch.int64)


def pair_hashes(rows: Tensor, columns: Tensor) -> Tensor:
    """Hash all pairs of two sets of studies; symmetric, so pair (i, j) has the hash of (j, i).

    Args:
        rows: (R,) int64 of `study_identity`.
        columns: (C,) int64 of `study_identity`.

    Returns:
        (R, C) int64 in [0, 2^HASH_BITS).
    """
    mixed = rows[:, None] + columns[None, :]  # wraps around
    for shift, factor in _ROUNDS:
        mixed ^= (mixed >> shift) & ((1 << (64 - shift)) - 1)  # a shift of a signed integer copies the sign
        mixed *= factor
    mixed ^= (mixed >> 31) & ((1 << 33) - 1)
    return (mixed >> (64 - HASH_BITS)) & _HASH_MASK


@torch.no_grad()
def pair_order(candidates: Tensor, strength: Tensor, identity: Tensor) -> Tensor:
    """Rank the pairs of a batch by strength, and pairs of equal strength by the hash of their studies.

    Args:
        candidates: (B, B) bool, the pairs to rank.
        strength: (B, B) in [0, 1], larger is stronger.
        identity: (B,) int64 of `study_identity`.

    Returns:
        (B, B) int64, larger ranks first: `strength` in steps of 1 / STEPS in the high bits, the hash in the low bits; -1
        for pairs that are not candidates. Only pairs of the same two studies and of equal strength are equal.
    """
    order = torch.empty(candidates.shape, dtype=torch.int64, device=candidates.device)
    rows = max(1, _BLOCK.get(candidates.device.type, _BLOCK["cuda"]) // max(1, len(candidates)))
    for at in range(0, len(candidates), rows):
        part = slice(at, at + rows)
        block = strength[part].clamp(0, 1).mul(STEPS).round_().long().bitwise_left_shift_(HASH_BITS)
        block |= pair_hashes(identity[part], identity)
        order[part] = block.masked_fill_(~candidates[part], -1)
    return order
