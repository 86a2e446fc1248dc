"""Build time, lookup time, recall and memory of the X-ray index, for planning: `make bench-index`.

Every row is a process of its own with a set number of threads. Keys are unit rows drawn around random centres, as
embeddings of reports lie; queries are keys disturbed by noise. Recall@1 is measured against the exact search.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SEED = 0
DIMENSION = 512
CENTRES = 4000
QUERIES = 256
BATCHES = (1, 32, 128)
KINDS = ("exact", "ivf", "hnsw")
OUT = Path(__file__).parents[1] / "runs" / "bench"


def keys_and_queries(rows: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(rows, 512) and (256, 512) unit rows; the same for the same number of rows."""
    draw = np.random.default_rng(SEED)
    centres = draw.standard_normal((CENTRES, DIMENSION), dtype=np.float32)
    keys = np.empty((rows, DIMENSION), dtype=np.float32)
    for start in range(0, rows, 100_000):
        part = keys[start : start + 100_000]
        part[:] = centres[draw.integers(0, CENTRES, len(part))]
        part += draw.standard_normal(part.shape, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    chosen = keys[draw.choice(rows, QUERIES, replace=False)]
    noise = draw.standard_normal(chosen.shape, dtype=np.float32) * np.float32(0.5 / DIMENSION**0.5)
    queries = chosen + noise
    return keys, queries / np.linalg.norm(queries, axis=1, keepdims=True)


def measure(kind: str, rows: int, threads: int, repeats: int) -> dict[str, float]:
    """One row of the table."""
    import torch

    torch.set_num_threads(threads)
    import faiss  # after torch, see retrieval/index.py

    from ctx_distill.retrieval.index import XrayIndex, build_index

    faiss.omp_set_num_threads(threads)
    keys, queries = keys_and_queries(rows)
    asked = torch.from_numpy(queries)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    probes = asked[:1]  # recall is measured below, on all queries
    built = build_index(keys, kind, device="cpu", probes=probes)  # type: ignore[arg-type]
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.faiss"
        built.save(path)
        size = path.stat().st_size
        index = XrayIndex.load(path, device="cpu")
        found, _ = index.search(asked, 1)
        result = {"build_s": seconds, "build_peak_mb": peak / 1024, "file_mb": size / 1e6}
        for batch in BATCHES:
            times = []
            for repeat in range(repeats + 1):
                part = asked[(repeat * batch) % (QUERIES - batch + 1) :][:batch]
                start = time.perf_counter()
                index.search(part, 8)
                times.append(time.perf_counter() - start)
            result[f"lookup_{batch}_ms"] = statistics.median(times[1:]) * 1e3
    best = np.concatenate([(queries[i : i + 32] @ keys.T).max(axis=1) for i in range(0, QUERIES, 32)])
    result["recall_at_1"] = float((found[:, 0].numpy() >= best - 1e-5).mean())
    return result


def main() -> None:
    """Print the table and write it, or, as a child, one row of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT / "index.json")
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "ROWS"), default=None)
    options = parser.parse_args()
    if options.measure:
        kind, rows = options.measure
        print(json.dumps(measure(kind, int(rows), options.threads, options.repeats)))
        return
    print(
        f"{options.threads} threads, {DIMENSION} dimensions, float32, seed {SEED}; lookups of 8 neighbours, medians of {options.repeats}"
    )
    head = f"{'rows':>9} {'kind':<6}{'build s':>9}{'build MB':>10}{'file MB':>9}"
    print(head + "".join(f"{f'{batch} ms':>10}" for batch in BATCHES) + f"{'recall@1':>10}", flush=True)
    table = []
    for rows in options.rows:
        for kind in options.kinds:
            command = [sys.executable, __file__, "--measure", kind, str(rows), "--threads", str(options.threads)]
            command += ["--repeats", str(options.repeats)]
            done = subprocess.run(
                command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(options.threads)}
            )
            if done.returncode:
                raise SystemExit(f"{kind}, {rows} rows: {done.stderr}")
            row = json.loads(done.stdout.splitlines()[-1])
            table.append({"rows": rows, "kind": kind, **row})
            line = f"{rows:>9,} {kind:<6}{row['build_s']:>9.1f}{row['build_peak_mb']:>10.0f}{row['file_mb']:>9.0f}"
            print(
                line + "".join(f"{row[f'lookup_{b}_ms']:>10.2f}" for b in BATCHES) + f"{row['recall_at_1']:>10.3f}",
                flush=True,
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_name(f"{options.out.name}.partial")
    partial.write_text(json.dumps({"threads": options.threads, "seed": SEED, "rows": table}, indent=1) + "\n")
    partial.replace(options.out)


if __name__ == "__main__":
    main()
