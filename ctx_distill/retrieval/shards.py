"""The parts of the pool's embeddings that the ranks of a predict job write as they go, and how they are joined.

The pool is embedded block by block; of each, every rank writes its part. A job that was stopped goes on with the blocks
whose parts do not all stand. A block is always embedded whole, so that its batches, and with them the last bits of its
features, are those of a job that never stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctx_distill.files import write_json
from ctx_distill.retrieval.store import map_tensors
from ctx_distill.types import InputError

REQUEST_FILE = "shards.json"


def open_shards(folder: Path, request: str) -> None:
    """Make a folder of shards ready for a request: what another request left there is deleted.

    Args:
        folder: of the shards.
        request: a hash of everything that the embeddings depend on.
    """
    path = folder / REQUEST_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["request"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found != request:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(path, {"request": request})


def shard_path(folder: Path, rank: int, block: int) -> Path:
    """Where a rank's part of a block lies."""
    return folder / f"shard-{block:06d}-{rank:05d}.safetensors"


def standing_blocks(folder: Path, world_size: int, blocks: int) -> list[int]:
    """The blocks of which every rank's part can be opened."""
    return [
        block for block in range(blocks) if all(_opens(shard_path(folder, rank, block)) for rank in range(world_size))
    ]


def _opens(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def write_shard(
    folder: Path, rank: int, world_size: int, keys: Tensor, values: Tensor, rows: Tensor, block: int = 0
) -> Path:
    """Write one rank's part of a block of the pool's embeddings, whole or not at all.

    Args:
        folder: of the shards.
        rank: this rank.
        world_size: number of ranks, so that a missing shard is noticed.
        keys: (n, D_k).
        values: (n, D_v).
        rows: (n,) int64, the manifest row of each.
        block: which part of the pool.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = shard_path(folder, rank, block)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    tensors = {"keys": keys.float(), "values": values.float(), "row": rows.to(torch.int64)}
    save_file(
        {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
        part,
        metadata={"rank": str(rank), "world_size": str(world_size), "block": str(block)},
    )
    part.replace(path)
    return path


def merge_shards(folder: Path, rows: Sequence[int] | Tensor) -> dict[str, Tensor]:
    """Join the shards of all ranks into one table; shards are memory-mapped and copied one after the other.

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
    parts, places, sizes = [], [], set()
    for path in paths:
        try:
            with safe_open(path, framework="pt") as handle:
                metadata = handle.metadata() or {}
                places.append((int(metadata["block"]), int(metadata["rank"])))
                sizes.add(int(metadata["world_size"]))
            tensors = map_tensors(path)
            parts.append((tensors["keys"], tensors["values"], tensors["row"]))
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise InputError(f"{path}: not a readable shard ({error}). {again}") from error
    blocks, ranks = sorted({block for block, _ in places}), sorted({rank for _, rank in places})
    whole = [(block, rank) for block in range(len(blocks)) for rank in range(max(sizes, default=0))]
    if len(sizes) != 1 or sorted(places) != whole:
        raise InputError(
            f"{folder}: holds shards of ranks {ranks} of runs with {sorted(sizes)} ranks, {len(places)} in "
            f"{len(blocks)} blocks; expected every rank of one run in every block. {again}"
        )
    wanted = torch.as_tensor(rows, dtype=torch.int64)
    found, counts = torch.cat([part[2] for part in parts]).unique(return_counts=True)  # type: ignore[no-untyped-call]
    problems = {
        "doubled": found[counts > 1],
        "missing": wanted[~torch.isin(wanted, found)],
        "not expected": found[~torch.isin(found, wanted)],
    }
    told = [f"{len(bad)} {what} (first: row {int(bad[0])})" for what, bad in problems.items() if len(bad)]
    if told or len(set(wanted.tolist())) != len(wanted):
        told = told or ["rows asked for twice"]
        raise InputError(f"{folder}: shards do not hold every row exactly once: {', '.join(told)}. {again}")
    order = wanted.argsort()
    keys, values = (torch.empty(len(wanted), parts[0][which].shape[1]) for which in (0, 1))
    for part in parts:
        place = order[torch.searchsorted(wanted[order], part[2])]
        keys[place], values[place] = part[0], part[1]
    return {"keys": keys, "values": values, "row": wanted}
