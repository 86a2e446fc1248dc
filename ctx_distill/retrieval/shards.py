"""The parts of the pool's embeddings that the ranks of a predict job write, and how they are joined."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctx_distill.retrieval.store import map_tensors
from ctx_distill.types import InputError


def write_shard(folder: Path, rank: int, world_size: int, keys: Tensor, values: Tensor, rows: Tensor) -> Path:
    """Write one rank's part of the pool's embeddings; give a fresh folder a predict job.

    Args:
        folder: of the shards.
        rank: this rank.
        world_size: number of ranks, so that a missing shard is noticed.
        keys: (n, D_k).
        values: (n, D_v).
        rows: (n,) int64, the manifest row of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"shard-{rank:05d}.safetensors"
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    tensors = {"keys": keys.float(), "values": values.float(), "row": rows.to(torch.int64)}
    save_file(
        {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
        part,
        metadata={"rank": str(rank), "world_size": str(world_size)},
    )
    part.replace(path)
    return path


def merge_shards(folder: Path, rows: Sequence[int] | Tensor) -> dict[str, Tensor]:
    """Join the shards of all ranks into one table.

    Args:
        folder: of the shards.
        rows: (N,) the manifest rows that must be there, in the order wanted.

    Returns:
        `keys` (N, D_k), `values` (N, D_v) and `row` (N,), in that order.

    Raises:
        InputError: a shard is missing, left over or unreadable, or a row is missing, doubled or not expected.
    """
    paths = sorted(folder.glob("shard-*.safetensors"))
    again = "Delete the folder and run the predict job again."
    parts, ranks, sizes = [], [], set()
    for path in paths:
        try:
            with safe_open(path, framework="pt") as handle:
                metadata = handle.metadata() or {}
                ranks.append(int(metadata["rank"]))
                sizes.add(int(metadata["world_size"]))
            tensors = map_tensors(path)
            parts.append((tensors["keys"], tensors["values"], tensors["row"]))
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise InputError(f"{path}: not a readable shard ({error}). {again}") from error
    if len(sizes) != 1 or sorted(ranks) != list(range(next(iter(sizes)))):
        raise InputError(
            f"{folder}: holds shards of ranks {sorted(ranks)} of runs with {sorted(sizes)} ranks; "
            f"expected every rank of one run. {again}"
        )
    wanted = torch.as_tensor(rows, dtype=torch.int64)
    row = torch.cat([part[2] for part in parts])
    found, counts = row.unique(return_counts=True)  # type: ignore[no-untyped-call]
    problems = {
        "doubled": found[counts > 1],
        "missing": wanted[~torch.isin(wanted, found)],
        "not expected": found[~torch.isin(found, wanted)],
    }
    told = [f"{len(bad)} {what} (first: row {int(bad[0])})" for what, bad in problems.items() if len(bad)]
    if told or len(set(wanted.tolist())) != len(wanted):
        told = told or ["rows asked for twice"]
        raise InputError(f"{folder}: shards do not hold every row exactly once: {', '.join(told)}. {again}")
    order = row.argsort()[torch.searchsorted(found, wanted)]
    return {
        "keys": torch.cat([part[0] for part in parts])[order],
        "values": torch.cat([part[1] for part in parts])[order],
        "row": row[order],
    }
