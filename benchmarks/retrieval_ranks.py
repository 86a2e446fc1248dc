"""Memory and time of retrieval ranks over all studies: in blocks, beside keeping every similarity.

    make bench-retrieval          (or: python benchmarks/retrieval_ranks.py --rows 5000 20000 --blocks-only 50000)

`blocks` is `ctx_distill.metrics.report_retrieval.report_retrieval`, both directions. `all kept` is what it did before: the
similarities of all queries with all studies in float64, one pass over each row per kind of rank. Every line is measured in a
process of its own: what the process grows by (peak of the resident set, with one bootstrap replicate) and seconds of the
CPU. Features are random unit vectors of 512 dimensions; a tenth of the reports are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from large_batch import measure

SEED = 0
DIM = 512
BLOCK = 512


def all_kept(image: Any, text: Any, reports: list[str]) -> dict[str, list[float]]:
    """Ranks from similarities that are all held at once."""
    import numpy as np

    group = np.unique(reports, return_inverse=True)[1]
    own = np.arange(len(image))
    ranks: dict[str, list[float]] = {}
    for direction, queries, pool in (("report_to_volume", text, image), ("volume_to_report", image, text)):
        parts = [(i, queries[i : i + BLOCK] @ pool.T) for i in range(0, len(pool), BLOCK)]
        for name, codes in (("rank", group), ("strict_rank", own)):
            found = []
            for start, scores in parts:
                for at, row in enumerate(scores):
                    positive = codes == codes[start + at]
                    found.append(1.0 + float((row[~positive] >= row[positive].max()).sum()))
            ranks[f"{direction}.{name}"] = found
    return ranks


def measure_ranks(rows: int, how: str) -> dict[str, float]:
    """Ranks of both directions of `rows` studies; a checksum of them tells whether both ways agree."""
    import numpy as np

    from ctx_distill.metrics.report_retrieval import DIRECTIONS, report_retrieval

    rng = np.random.default_rng(SEED)
    text = rng.normal(size=(rows, DIM))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    image = text + 0.15 * rng.normal(size=(rows, DIM))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    reports = ["normal" if i % 10 == 0 else f"report {i}" for i in range(rows)]
    ranks: dict[str, Any] = {}

    def step() -> None:
        if how == "all kept":
            ranks.update(all_kept(image, text, reports))
            return
        found = report_retrieval(image, text, reports, np.arange(rows), n=1)[1]
        ranks.update({f"{d}.{name}": found[d][name] for d in DIRECTIONS for name in ("rank", "strict_rank")})

    result = measure(step)
    return result | {"checksum": float(sum(np.sum(ranks[name]) for name in sorted(ranks)))}


def in_its_own_process(rows: int, how: str) -> dict[str, float]:
    """Run `measure_ranks` in a fresh process."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", json.dumps({"rows": rows, "how": how})]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    result: dict[str, float] = json.loads(printed.splitlines()[-1])
    return result


def report(sizes: list[int], blocks_only: list[int]) -> None:
    """Measure everything and print it as it comes."""
    print(f"{os.cpu_count()} CPU cores, one thread, {DIM} dimensions, seed {SEED}\n")
    print(f"{'studies':>8}  {'':<10}{'MB':>9}{'CPU s':>9}{'clock s':>9}", flush=True)
    for rows in [*sizes, *blocks_only]:
        found = {}
        for how in ("all kept", "blocks") if rows in sizes else ("blocks",):
            one = found[how] = in_its_own_process(rows, how)
            print(
                f"{rows:>8,}  {how:<10}{one['megabytes']:>9,.0f}{one['seconds']:>9.1f}{one['clock']:>9.1f}", flush=True
            )
        if len(found) == 2:
            kept, blocks = found["all kept"], found["blocks"]
            assert kept["checksum"] == blocks["checksum"]
            print(f"{'':>8}  blocks / all kept: memory {blocks['megabytes'] / kept['megabytes']:.3f}, CPU"
                  f" {blocks['seconds'] / kept['seconds']:.2f}; the same ranks", flush=True)  # fmt: skip


def main() -> None:
    """Print the report, or, as a child of it, one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[5000, 20000])
    parser.add_argument("--blocks-only", type=int, nargs="*", default=[], help="numbers of studies for `blocks` alone")
    parser.add_argument("--measure", metavar="JSON", help="arguments of one measurement")
    given = parser.parse_args()
    if given.measure is None:
        report(given.rows, given.blocks_only)
    else:
        print(json.dumps(measure_ranks(**json.loads(given.measure))))


if __name__ == "__main__":
    main()
