"""The X-ray index on a GPU beside the CPU: time per batch, recall@1, memory, and whether both give the same neighbours.

Each index is built once, on the CPU, and searched from there and from the GPU through `XrayIndex`, as stage 2 searches it.
Keys and queries are those of `make bench-index`. A row of the result is one index (kind and number of keys) on one device;
it is written as soon as it is measured, and after `--limit` seconds no further row is begun. Without a GPU, or without a
faiss that can use one, only `--device cpu` runs: a rehearsal in which the CPU index takes the place of the GPU's.

`ms_<batch>` is the median over repeats of the wall time of one search of k = 8 neighbours, all threads given, copies of the
queries to the index and of the result back included. `same_neighbours` compares with the CPU's search of the same index:
the share of queries whose positions are equal in the same order, and `largest_difference` that of the similarities. The
exact index promises 1.0 and 0, ties included; of `ivf` the lists that are visited may differ where centroids nearly tie.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from index import DIMENSION, NEIGHBOURS, SEED, keys_and_queries, memory_mb

from ctx_distill.errors import InputError
from ctx_distill.files import write_json

ROWS = {"full": (100_000, 1_000_000), "small": (4_000, 20_000)}
BATCHES = (1, 32, 1024)
KINDS = ("exact", "ivf")
REPEATS, SECONDS = 9, 4.0
"""Searches per batch size: so many, or as many as fit into so many seconds, at least 2 beside one that warms up."""
OUT = Path(__file__).parents[1] / "runs" / "bench" / "faiss_gpu.json"


def device_bytes() -> int:
    """Memory in use on the GPU, by all; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def searches(search: Callable[[Any], Any], queries: Any, batch: int) -> dict[str, float]:
    """Median, shortest and longest wall time of a search of `batch` queries, in milliseconds."""
    spent: list[float] = []
    began = time.perf_counter()
    while len(spent) < 3 or (len(spent) <= REPEATS and time.perf_counter() - began < SECONDS):
        start = (len(spent) * batch) % (len(queries) - batch + 1)
        at = time.perf_counter()
        search(queries[start : start + batch])
        spent.append(1e3 * (time.perf_counter() - at))
    return {
        f"ms_{batch}": statistics.median(spent[1:]),
        f"ms_{batch}_min": min(spent[1:]),
        f"ms_{batch}_max": max(spent[1:]),
    }


def measure(rows: int, device: str, finished: Callable[[dict[str, Any]], None], deadline: float) -> None:
    """Measure every kind of index over so many keys, on the CPU and then on the device.

    Args:
        rows: keys.
        device: `gpu`, or `cpu` in a rehearsal.
        finished: is given each row as it is measured.
        deadline: of `time.monotonic()`, after which no row is begun.
    """
    import torch

    from ctx_distill.retrieval.build_index import construct, recall_at_1
    from ctx_distill.retrieval.index import XrayIndex

    keys, asked = keys_and_queries(rows, max(BATCHES))
    queries = torch.from_numpy(asked)
    on_device = queries.to("cuda") if device == "gpu" else queries
    for kind in KINDS:
        if time.monotonic() > deadline:
            return
        before, began = memory_mb("RssAnon"), time.perf_counter()
        cpu = construct(keys, kind, device="cpu")
        facts: dict[str, Any] = {"keys": rows, "kind": kind, "build_s": time.perf_counter() - began}
        expected = cpu.search(queries, NEIGHBOURS)
        row = {**facts, "device": "cpu", "host_mb": memory_mb("RssAnon") - before}
        for batch in BATCHES:
            row |= searches(lambda part, index=cpu: index.search(part, NEIGHBOURS), queries, batch)
        row["recall_at_1"] = recall_at_1(cpu, keys, queries)
        finished(row)
        used = device_bytes()
        other = XrayIndex(cpu._cpu, kind, device, equal=cpu.equal)  # type: ignore[arg-type]
        if device == "gpu" and not other.on_gpu:
            raise InputError(f"the {kind} index was asked onto the GPU and is on the CPU.")
        similarity, position = (x.cpu() for x in other.search(on_device, NEIGHBOURS))
        row = {**facts, "device": device if device == "gpu" else "cpu again"}
        row["device_mb"] = (device_bytes() - used) / 1e6
        for batch in BATCHES:
            row |= searches(lambda part, index=other: index.search(part, NEIGHBOURS), on_device, batch)
        row["recall_at_1"] = recall_at_1(other, keys, queries)
        row["same_neighbours"] = float((position == expected[1]).all(dim=1).float().mean())
        row["same_nearest"] = float((position[:, 0] == expected[1][:, 0]).float().mean())
        row["largest_difference"] = float((similarity - expected[0]).abs().max())
        finished(row)
        del cpu, other


def no_gpu() -> str | None:
    """Why the index cannot be searched on a GPU here; None where it can."""
    from ctx_distill.retrieval.index import faiss_module, gpu_wanted, installed_faiss

    try:
        faiss_module()
        gpu_wanted("gpu")
    except InputError as error:
        return f"{error} Installed: {', '.join(installed_faiss()) or 'none'}."
    return None


def main() -> int:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal without a GPU")
    parser.add_argument("--scale", choices=tuple(ROWS), default="full")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--limit", type=float, default=np.inf, metavar="SECONDS", help="begin no row after so long")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    deadline = time.monotonic() + options.limit
    import torch

    from ctx_distill.retrieval.index import faiss_module, installed_faiss

    reason = no_gpu() if options.device == "cuda" else None
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" and torch.cuda.is_available() else "cpu",
        "faiss": installed_faiss(), "threads": options.threads, "dimension": DIMENSION, "neighbours": NEIGHBOURS,
        "seed": SEED, "scale": options.scale, "rehearsal": options.device == "cpu", "complete": False, "rows": [],
    }  # fmt: skip
    if reason is not None:
        write_json(options.out, {**result, "error": reason})
        print(f"not measured: {reason}")
        return 1
    torch.set_num_threads(options.threads)
    faiss_module().omp_set_num_threads(options.threads)
    head = f"{'keys':>9} {'kind':<6}{'device':<10}" + "".join(f"{f'ms, {batch}':>11}" for batch in BATCHES)
    print(head + f"{'recall@1':>10}{'same':>7}", flush=True)

    def finished(row: dict[str, Any]) -> None:
        result["rows"].append(row)
        write_json(options.out, result)
        line = f"{row['keys']:>9,} {row['kind']:<6}{row['device']:<10}"
        line += "".join(f"{row[f'ms_{batch}']:>11.3f}" for batch in BATCHES)
        print(f"{line}{row['recall_at_1']:>10.3f}{row.get('same_neighbours', 1.0):>7.3f}", flush=True)

    for rows in ROWS[options.scale]:
        if time.monotonic() < deadline:
            measure(rows, "gpu" if options.device == "cuda" else "cpu", finished, deadline)
    result["complete"] = len(result["rows"]) == 2 * len(KINDS) * len(ROWS[options.scale])
    write_json(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
