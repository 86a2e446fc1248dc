"""Keys that are equal: found once, so that an exact index holds each distinct key once and still answers for all.

Reports are often identical word for word (normal X-rays above all), and so are their keys. A search among all of them
would have to compare thousands of ties one by one; a search among distinct keys names one, and the positions that share
it follow from a table.

Equal keys are found by random hyperplanes (Charikar 2002, "Similarity estimation techniques from rounding algorithms"):
keys on the same side of all planes are compared with the first of them. Keys that are equal can only be missed where one
lies on a plane to the last bit; they then count as distinct, which costs time and changes no result.
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
"""Distinct keys per cell of the planes that are told apart; the members of a cell that are left count as distinct each."""

Keys = Tensor | NDArray[np.floating]


@dataclass(frozen=True)
class EqualKeys:
    """Which positions hold the same key. Distinct keys are numbered in the order of their first positions.

    Attributes:
        order: (N,) int64, all positions, distinct key by distinct key, rising within each.
        starts: (G + 1,) int64, where in `order` each distinct key's positions begin; the last is N.
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def firsts(self) -> NDArray[np.int64]:
        """(G,): the first position of each distinct key."""
        return self.order[self.starts[:-1]]

    def sizes(self, distinct: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many positions hold each of some distinct keys."""
        return self.starts[distinct + 1] - self.starts[distinct]

    def positions(self, distinct: NDArray[np.int64], most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first positions, at most so many of each, of some distinct keys (n,).

        Returns:
            (M,) places 0 to n - 1 in `distinct`, and (M,) positions.
        """
        taken = np.minimum(self.sizes(distinct), most)
        places = np.repeat(np.arange(len(distinct)), taken)
        within = np.arange(len(places)) - np.repeat(np.cumsum(taken) - taken, taken)
        return places, self.order[self.starts[distinct][places] + within]

    def part(self, start: int, end: int) -> EqualKeys:
        """The table of the distinct keys from `start` to `end`, numbered from 0; positions stay what they are."""
        return EqualKeys(
            self.order[self.starts[start] : self.starts[end]], self.starts[start : end + 1] - self.starts[start]
        )

    def save(self, path: Path) -> None:
        """Write the table, completely or not at all."""
        part = path.with_name(f".{path.name}.part")
        save_file({"order": torch.from_numpy(self.order), "starts": torch.from_numpy(self.starts)}, part)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> EqualKeys:
        """Read a table, memory-mapped.

        Raises:
            InputError: the file is damaged.
        """
        try:
            with safe_open(path, framework="pt") as handle:
                table = cls(handle.get_tensor("order").numpy(), handle.get_tensor("starts").numpy())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable table of equal keys ({error}). Run stage 1 again.") from error
        if not len(table.starts) or table.starts[0] != 0 or table.starts[-1] != len(table.order):
            raise InputError(f"{path}: the table of equal keys is damaged. Run stage 1 again.")
        return table


def equal_keys(keys: Keys) -> EqualKeys | None:
    """The table of equal keys among (N, D); None where all are distinct."""
    return tabulate(first_near(keys, 0.0))


def tabulate(first: NDArray[np.int64]) -> EqualKeys | None:
    """The table in which each position shares the key of another, its first one (N,); None where all are their own."""
    order = np.argsort(first, kind="stable")
    starts = np.flatnonzero(np.diff(first[order], prepend=-1))
    if len(starts) == len(first):
        return None
    return EqualKeys(order.astype(np.int64), np.append(starts, len(first)).astype(np.int64))


def first_near(keys: Keys, tolerance: float) -> NDArray[np.int64]:
    """(N,) the first position whose key is at most `tolerance` (Euclidean) from each of the keys (N, D); its own mostly.

    Keys are read part by part; beside them some 60 bytes per key are held.
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
    """(N, PLANES / 64): on which side of each plane each key is, as bits.

    Planes pass beside the keys' mean, not through it: a key that most positions share is (nearly) the mean, and its last
    bits must not decide.
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
