"""The parts of the pool's embeddings that the ranks of a predict job write as they go, and how they are joined.

The pool is embedded block by block; of each, every rank writes its part. A job that was stopped resumes with the blocks
that are incomplete. A block is always embedded as a whole, so that its batches, and with them the last bits of its
features, are those of a job that never stopped.

A job that resumes with another number of ranks, or with parts of another size, keeps every part that is there, complete
block or not. Its own blocks are cut from the rows that are left, and are numbered on from the earlier ones.
"""

from __future__ import annotations

import json
import shutil
import uuid
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
SHARDS = "shard-*.safetensors"


def open_shards(folder: Path, request: str, ranks: int, part_items: int) -> int:
    """Make a folder of shards ready for a job, and print in one line what happens to what an earlier job left there.

    Shards of another request are deleted. Those of the same request stay; where the earlier job had another layout (number
    of ranks, size of parts), the new one's blocks begin behind its blocks.

    Args:
        folder: of the shards.
        request: a hash of everything that the embeddings depend on, but for the layout.
        ranks: of this job.
        part_items: rows per rank and block.

    Returns:
        The first block of this job's layout. Shards of earlier blocks never change again.
    """
    path = folder / REQUEST_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        layouts = list(found["layouts"]) if found["request"] == request else None
    except (OSError, ValueError, KeyError, TypeError):
        layouts = None
    if layouts is None:
        if any(folder.glob(SHARDS)):
            print(f"{folder}: holds parts of other inputs, settings or versions; the pool is embedded from the start")
        shutil.rmtree(folder, ignore_errors=True)
        layouts = []
    own = {"ranks": ranks, "part_items": part_items}
    if not layouts or {name: layouts[-1][name] for name in own} != own:
        kept = []
        for shard in folder.glob(SHARDS):
            if _opens(shard):
                kept.append(shard)
            else:
                shard.unlink()
        if layouts:
            last = layouts[-1]
            print(
                f"{folder}: embedded by {last['ranks']} ranks in parts of {last['part_items']} so far; these "
                f"{len(kept)} parts are kept, and {ranks} ranks embed the rest in parts of {part_items}"
            )
        layouts.append({**own, "first_block": 1 + max(map(_block, kept), default=-1)})
        write_json(path, {"request": request, "layouts": layouts})
    return int(layouts[-1]["first_block"])


def kept_rows(folder: Path, first_block: int) -> Tensor:
    """The manifest rows, (n,) int64, that jobs of earlier layouts embedded: those of the shards before a block."""
    rows = [map_tensors(path)["row"] for path in sorted(folder.glob(SHARDS)) if _block(path) < first_block]
    return torch.cat([torch.empty(0, dtype=torch.int64), *rows])


def shard_path(folder: Path, rank: int, block: int) -> Path:
    """Where a rank's part of a block lies."""
    return folder / f"shard-{block:06d}-{rank:05d}.safetensors"


def _block(path: Path) -> int:
    return int(path.name.split("-")[1])


def standing_blocks(folder: Path, world_size: int, blocks: int, first_block: int = 0) -> list[int]:
    """Those of so many blocks from the first on of which every rank's part can be opened."""
    return [
        block
        for block in range(first_block, first_block + blocks)
        if all(_opens(shard_path(folder, rank, block)) for rank in range(world_size))
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
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    tensors = {"keys": keys.float(), "values": values.float(), "row": rows.to(torch.int64)}
    save_file(
        {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
        part,
        metadata={"rank": str(rank), "world_size": str(world_size), "block": str(block)},
    )
    part.replace(path)
    return path


def merge_shards(folder: Path, rows: Sequence[int] | Tensor, first_block: int = 0) -> dict[str, Tensor]:
    """Join the shards of all ranks into one table; shards are memory-mapped and copied one after the other.

    Args:
        folder: of the shards.
        rows: (N,) the manifest rows that must be there, in the order wanted.
        first_block: of the last job's layout; blocks of earlier layouts may lack the shards of some ranks.

    Returns:
        `keys` (N, D_k), `values` (N, D_v) and `row` (N,), in that order.

    Raises:
        InputError: a shard is missing, left over or unreadable, or a row is missing, doubled or not expected.
    """
    paths = sorted(folder.glob(SHARDS))
    again = "Delete the folder and run the predict job again."
    parts, places, sizes = [], [], set()
    for path in paths:
        try:
            with safe_open(path, framework="pt") as handle:
                metadata = handle.metadata() or {}
                if int(metadata["block"]) >= first_block:
                    places.append((int(metadata["block"]), int(metadata["rank"])))
                    sizes.add(int(metadata["world_size"]))
            tensors = map_tensors(path)
            parts.append((tensors["keys"], tensors["values"], tensors["row"]))
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise InputError(f"{path}: not a readable shard ({error}). {again}") from error
    blocks, ranks = sorted({block for block, _ in places}), sorted({rank for _, rank in places})
    numbers = range(first_block, first_block + len(blocks))
    complete = [(block, rank) for block in numbers for rank in range(max(sizes, default=0))]
    if (len(sizes) != 1 and not (first_block and not sizes)) or sorted(places) != complete:
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
