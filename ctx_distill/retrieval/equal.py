"""Deduplicate keys: an exact index stores each distinct key once, with a table of the positions that share it.

Reports are often identical (of normal X-rays above all), and so are their keys. Searching all of them would compare
thousands of ties; searching distinct keys returns one, and the table gives the positions that share it.

Equal keys are detected with random hyperplanes (Charikar 2002, "Similarity estimation techniques from rounding
algorithms"): keys on the same side of all planes are compared with the first of them. Equal keys can be missed only if
one is on a plane up to rounding. They then count as distinct, which costs time but does not change results.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctx_distill.types import InputError

EQUAL_FILE = "equal_keys.safetensors"
PLANES = 128
CHUNK = 65_536
ROUNDS = 64
"""Maximum distinct keys resolved per cell of the planes; the remaining members of a cell count as distinct."""

Keys = Tensor | NDArray[np.floating]


@dataclass(frozen=True)
class EqualKeys:
    """Table of the positions that share a key. Distinct keys are numbered in the order of their first positions.

    Attributes:
        order: (N,) int64, all positions, grouped by distinct key and ascending within each group.
        starts: (G + 1,) int64, start of each distinct key's group in `order`; the last is N.
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def firsts(self) -> NDArray[np.int64]:
        """First position of each distinct key, (G,)."""
        return self.order[self.starts[:-1]]

    def sizes(self, distinct: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of positions of each of the given distinct keys."""
        return self.starts[distinct + 1] - self.starts[distinct]

    def positions(self, distinct: NDArray[np.int64], most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first positions of distinct keys (n,), at most `most` of each.

        Returns:
            Indices (M,) into `distinct`, and positions (M,).
        """
        taken = np.minimum(self.sizes(distinct), most)
        places = np.repeat(np.arange(len(distinct)), taken)
        within = np.arange(len(places)) - np.repeat(np.cumsum(taken) - taken, taken)
        return places, self.order[self.starts[distinct][places] + within]

    def part(self, start: int, end: int) -> EqualKeys:
        """Return the table of the distinct keys from `start` to `end`, renumbered from 0, with unchanged positions."""
        return EqualKeys(
            self.order[self.starts[start] : self.starts[end]], self.starts[start : end + 1] - self.starts[start]
        )

    def save(self, path: Path) -> None:
        """Write the table atomically."""
        part = path.with_name(f".{path.name}.part")
        save_file({"order": torch.from_numpy(self.order), "starts": torch.from_numpy(self.starts)}, part)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> EqualKeys:
        """Read a table, memory-mapped.

        Raises:
            InputError: The file is corrupt.
        """
        try:
            with safe_open(path, framework="pt") as handle:
                table = cls(handle.get_tensor("order").numpy(), handle.get_tensor("starts").numpy())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable table of equal keys ({error}). Rerun stage 1.") from error
        if not len(table.starts) or table.starts[0] != 0 or table.starts[-1] != len(table.order):
            raise InputError(f"{path}: the table of equal keys is corrupt. Rerun stage 1.")
        return table


def equal_keys(keys: Keys) -> EqualKeys | None:
    """Return the table of equal keys among (N, D), or None if all are distinct."""
    return tabulate(first_near(keys, 0.0))


def tabulate(first: NDArray[np.int64]) -> EqualKeys | None:
    """Return the table built from each position's first equal position (N,), or None if all positions are distinct."""
    order = np.argsort(first, kind="stable")
    starts = np.flatnonzero(np.diff(first[order], prepend=-1))
    if len(starts) == len(first):
        return None
    return EqualKeys(order.astype(np.int64), np.append(starts, len(first)).astype(np.int64))


def first_near(keys: Keys, tolerance: float) -> NDArray[np.int64]:
    """Return, for each key (N, D), the first position whose key is within `tolerance` (Euclidean distance), (N,).

    Keys are read in parts; about 60 further bytes per key are held in memory.
    """
    cells = _cells(keys)
    first = np.arange(len(cells))
    order = np.lexsort((first, *cells.T))  # by cell, within it by position
    begins = np.flatnonzero((np.diff(cells[order], axis=0, prepend=~cells[order[:1]]) != 0).any(axis=1))
    lengths = np.diff(begins, append=len(order))
    shared = np.repeat(lengths > 1, lengths)
    left, cell = order[shared], np.repeat(np.arange(len(lengths)), lengths)[shared]
    for _ in range(ROUNDS):
        if not len(left):
            break
        heads = np.flatnonzero(np.diff(cell, prepend=-1))
        head = left[np.repeat(heads, np.diff(heads, append=len(left)))]
        near = np.concatenate([
            _distances(keys, left[start : start + CHUNK], head[start : start + CHUNK]) <= tolerance
            for start in range(0, len(left), CHUNK)
        ])  # fmt: skip
        near |= left == head
        first[left[near]] = head[near]
        left, cell = left[~near], cell[~near]
    return first


def _cells(keys: Keys) -> NDArray[np.uint64]:
    """Return the side of each plane on which each key is, as bits (N, PLANES / 64).

    The planes do not pass through the keys' mean: a key that most positions share is close to the mean, and its rounding
    must not decide.
    """
    rows, dimension = keys.shape
    sample = _rows(keys, np.linspace(0, rows - 1, min(rows, 4096)).astype(np.int64))
    draw = np.random.default_rng(0)
    planes = draw.standard_normal((dimension, PLANES), dtype=np.float32)
    projected = sample @ planes
    offsets = projected.mean(axis=0) + np.maximum(projected.std(axis=0), 1e-3) * draw.normal(0, 0.5, PLANES)
    sides = [
        np.packbits(_rows(keys, slice(start, start + CHUNK)) @ planes > offsets, axis=1)
        for start in range(0, rows, CHUNK)
    ]
    return np.concatenate(sides).view(np.uint64)


def _distances(keys: Keys, one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.float32]:
    difference = _rows(keys, one) - _rows(keys, other)
    distances: NDArray[np.float32] = np.sqrt(np.einsum("nd,nd->n", difference, difference))
    return distances


def _rows(keys: Keys, rows: NDArray[np.int64] | slice) -> NDArray[np.float32]:
    taken = keys[torch.from_numpy(rows) if isinstance(rows, np.ndarray) and isinstance(keys, Tensor) else rows]
    return taken.float().numpy() if isinstance(taken, Tensor) else np.asarray(taken, dtype=np.float32)
