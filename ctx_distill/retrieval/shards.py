"""Write and merge the shards of the pool's embeddings.

The pool is embedded in blocks, of which every rank writes a shard. An interrupted job resumes with the incomplete blocks. A
block is always embedded completely, so that its batches, and the last bits of its features, are those of an uninterrupted
job.

A job that resumes with another number of ranks, or another block size, keeps all existing shards. Its blocks consist of the
remaining rows, and their numbers continue those of the earlier blocks.
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
    """Prepare a folder of shards for a job, and print what happens to the shards of an earlier job.

    Shards of another request are deleted. Those of the same request are kept; if the earlier job had another layout
    (number of ranks, block size), the new blocks are numbered after the old ones.

    Args:
        folder: Folder of the shards.
        request: a hash of everything that the embeddings depend on, except the layout.
        ranks: Number of ranks of this job.
        part_items: Rows per rank and block.

    Returns:
        The first block of this job's layout. Shards of earlier blocks do not change any more.
    """
    path = folder / REQUEST_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        layouts = list(record["layouts"]) if record["request"] == request else None
    except (OSError, ValueError, KeyError, TypeError):
        layouts = None
    if layouts is None:
        if any(folder.glob(SHARDS)):
            print(f"{folder}: has shards of other inputs, settings or versions; the pool is embedded from the start")
        shutil.rmtree(folder, ignore_errors=True)
        layouts = []
    layout = {"ranks": ranks, "part_items": part_items}
    if not layouts or {name: layouts[-1][name] for name in layout} != layout:
        kept = []
        for shard in folder.glob(SHARDS):
            if _opens(shard):
                kept.append(shard)
            else:
                shard.unlink()
        if layouts:
            last = layouts[-1]
            print(
                f"{folder}: {len(kept)} shards of {last['ranks']} ranks in parts of {last['part_items']} are kept; {ranks} "
                f"ranks embed the rest in parts of {part_items}"
            )
        layouts.append({**layout, "first_block": 1 + max(map(_block, kept), default=-1)})
        write_json(path, {"request": request, "layouts": layouts})
    return int(layouts[-1]["first_block"])


def kept_rows(folder: Path, first_block: int) -> Tensor:
    """Return the manifest rows, (n,) int64, that earlier layouts have embedded, in shards before `first_block`."""
    rows = [map_tensors(path)["row"] for path in sorted(folder.glob(SHARDS)) if _block(path) < first_block]
    return torch.cat([torch.empty(0, dtype=torch.int64), *rows])


def shard_path(folder: Path, rank: int, block: int) -> Path:
    """Return the path of a rank's shard of a block."""
    return folder / f"shard-{block:06d}-{rank:05d}.safetensors"


def _block(path: Path) -> int:
    return int(path.name.split("-")[1])


def standing_blocks(folder: Path, world_size: int, blocks: int, first_block: int = 0) -> list[int]:
    """Return the complete blocks, of `blocks` blocks from `first_block`: those whose shards can all be opened."""
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
    """Write one rank's shard of a block atomically.

    Args:
        folder: Folder of the shards.
        rank: This rank.
        world_size: Number of ranks, to detect missing shards.
        keys: (n, D_k).
        values: (n, D_v).
        rows: (n,) int64, manifest rows.
        block: Number of the block.

    Returns:
        The path of the shard.
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
    """Merge the shards of all ranks into one table; shards are memory-mapped and copied one by one.

    Args:
        folder: Folder of the shards.
        rows: (N,) the expected manifest rows, in the requested order.
        first_block: First block of the last layout; blocks of earlier layouts may be incomplete.

    Returns:
        `keys` (N, D_k), `values` (N, D_v) and `row` (N,), in the order of `rows`.

    Raises:
        InputError: a shard is missing, unexpected or unreadable, or a row is missing, duplicated or unexpected.
    """
    paths = sorted(folder.glob(SHARDS))
    again = "Delete the folder and rerun the stage."
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
            f"{folder}: has shards of ranks {ranks} of runs with {sorted(sizes)} ranks, {len(places)} in "
            f"{len(blocks)} blocks; expected every rank of one run in every block. {again}"
        )
    wanted = torch.as_tensor(rows, dtype=torch.int64)
    present, counts = torch.cat([part[2] for part in parts]).unique(return_counts=True)  # type: ignore[no-untyped-call]
    problems = {
        "duplicated": present[counts > 1],
        "missing": wanted[~torch.isin(wanted, present)],
        "not expected": present[~torch.isin(present, wanted)],
    }
    messages = [f"{len(bad)} {what} (first: row {int(bad[0])})" for what, bad in problems.items() if len(bad)]
    if messages or len(set(wanted.tolist())) != len(wanted):
        messages = messages or ["rows requested twice"]
        raise InputError(
            f"{folder}: the shards must contain every row exactly once; problems: {', '.join(messages)}. {again}"
        )
    order = wanted.argsort()
    keys, values = (torch.empty(len(wanted), parts[0][which].shape[1]) for which in (0, 1))
    for part in parts:
        place = order[torch.searchsorted(wanted[order], part[2])]
        keys[place], values[place] = part[0], part[1]
    return {"keys": keys, "values": values, "row": wanted}
