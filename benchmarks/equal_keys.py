"""Exact lookups where many X-rays share a report, against a pool without repeats: `make bench-equal-keys`.

Keys are 100,000 unit rows of 512 dimensions around random centres, as in `benchmarks/index.py`. In the other cases some of
them, at random places, repeat one key: exactly, or but for noise in their last bits (as the embeddings of one text in
different batches). 32 queries lie near that key, so that it is always among their neighbours. Every case is an artefact as
stage 1 writes it; the rows `no table` are indexes that hold every key, as artefacts of earlier versions do. All cases are measured in turns in one process with one thread; what is printed is the median CPU time
and its ratio to the pool without repeats, at the same number of neighbours.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from index import DIMENSION, OUT, SEED, keys_and_queries
from numpy.typing import NDArray

from ctx_distill.files import write_json
from ctx_distill.retrieval.index import XrayIndex, faiss_module
from ctx_distill.retrieval.store import XrayIndexArtefact, write_index_artefact

QUERIES = 32
NEIGHBOURS = (1, 8, 64)
LAST_BITS = 6e-8
"""Relative noise of a key's components: one unit in the last place of a float32."""


def repeat(keys: NDArray[np.float32], repeats: int, noise: float) -> NDArray[np.float32]:
    """The keys with one of them at so many more places."""
    draw = np.random.default_rng(SEED + 1)
    changed = keys.copy()
    places = draw.choice(np.arange(1, len(keys)), repeats, replace=False)
    scale = 1 + noise * draw.standard_normal((repeats, keys.shape[1]), dtype=np.float32)
    changed[places] = keys[0] * scale.astype(np.float32)
    return changed


def store_of(folder: Path, keys: NDArray[np.float32]) -> XrayIndexArtefact:
    """An artefact of these keys, opened as a rank on the CPU opens it."""
    rows = range(len(keys))
    items = pd.DataFrame(dict.fromkeys(("study_id", "image_id", "patient_id", "row"), rows)).assign(split="train")
    write_index_artefact(
        folder,
        torch.from_numpy(keys),
        torch.ones(len(keys), 1),
        items.astype({"study_id": str}),
        {"xray-expert": "-"},
        {},
    )
    return XrayIndexArtefact.open(folder, device="cpu")


def index_of_all(keys: NDArray[np.float32]) -> XrayIndex:
    """An exact index that knows nothing of repeats."""
    flat = faiss_module().IndexFlatIP(keys.shape[1])
    flat.add(keys)
    return XrayIndex(flat, "exact", "cpu")


def main() -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=9, help="measurements of each case")
    parser.add_argument("--out", type=Path, default=OUT / "equal_keys.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss_module().omp_set_num_threads(1)
    keys, _ = keys_and_queries(options.rows)
    draw = np.random.default_rng(SEED + 2)
    noise = draw.standard_normal((QUERIES, DIMENSION), dtype=np.float32) * np.float32(0.5 / DIMENSION**0.5)
    queries = torch.nn.functional.normalize(torch.from_numpy(keys[:1] + noise), dim=-1)
    few, many = options.rows // 20, options.rows // 2
    cases = {"none": (0, 0.0), f"{few:,} equal": (few, 0.0), f"{many:,} equal": (many, 0.0)}
    cases |= {f"{few:,} in the last bits": (few, LAST_BITS), f"{many:,} in the last bits": (many, LAST_BITS)}
    spent: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        searched: dict[str, XrayIndexArtefact | XrayIndex] = {
            name: store_of(Path(folder, str(place)), repeat(keys, *case))
            for place, (name, case) in enumerate(cases.items())
        }
        searched |= {
            f"{name}, no table": index_of_all(repeat(keys, *case)) for name, case in cases.items() if case[0] == many
        }
        for turn in range(options.repeats + 1):  # the first one reads the files
            for name, store in searched.items():
                for k in NEIGHBOURS:
                    began = time.process_time()
                    store.search(queries, k)
                    if turn:
                        spent.setdefault((name, k), []).append(time.process_time() - began)
    print(
        f"{options.rows:,} keys of {DIMENSION} dimensions, {QUERIES} queries, seed {SEED}, one thread, median CPU ms of"
    )
    print(f"{options.repeats} lookups, and the ratio to the pool without repeats")
    print(f"{'repeats of one key':<32}" + "".join(f"{f'k = {k}':>18}" for k in NEIGHBOURS))
    table = []
    for name in searched:
        medians = [1e3 * statistics.median(spent[name, k]) for k in NEIGHBOURS]
        ratios = [ms / (1e3 * statistics.median(spent["none", k])) for k, ms in zip(NEIGHBOURS, medians, strict=True)]
        print(
            f"{name:<32}"
            + "".join(f"{f'{ms:.1f} ({ratio:.2f})':>18}" for ms, ratio in zip(medians, ratios, strict=True))
        )
        table.append({"repeats": name, "k": list(NEIGHBOURS), "cpu_ms": medians, "ratio": ratios})
    write_json(options.out, {"rows": options.rows, "seed": SEED, "dimension": DIMENSION, "table": table})


if __name__ == "__main__":
    main()
