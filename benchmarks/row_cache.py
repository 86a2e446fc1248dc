"""What keeping the features of frozen towers by row costs: in memory, on disk, and computed again.

    make bench-cache          (or: python benchmarks/row_cache.py)

Sweeps over the outputs of a CT encoder (pooled vector and tokens) as the report stage reads them, in shuffled batches, through
`ctx_distill.training.row_features.RowFeatures`. Every line is measured in a process of its own: what the process grows by over
the first sweep (resident set), the disk space taken, and the seconds per row of a further sweep, those of the CPU and those
of the clock (a disk is waited for). `disk, cold` drops the file from the page cache before the sweep. Volumes and weights are random.
`base` sweeps over stand-ins for the encoder's outputs; only `--again` volumes are encoded, for the line `computed again`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Any

from large_batch import measure

SEED = 0
ROWS = {"demo": 64, "base": 48}
SHAPES = {"demo": (40, 56, 56), "base": (96, 192, 192)}
BATCH = {"demo": 8, "base": 16}
LIMITS = {
    "memory": {"memory_gb": 100.0, "disk_gb": 0.0},
    "disk": {"memory_gb": 0.0, "disk_gb": 100.0},
    "disk, cold": {"memory_gb": 0.0, "disk_gb": 100.0},
    "computed again": {"memory_gb": 0.0, "disk_gb": 0.0},
}


def encoder_of(preset: str) -> Any:
    """The CT encoder of a preset, with random weights."""
    import torch

    from ctx_distill.models.ct_encoder import ResNet3D, ViT3D

    torch.manual_seed(SEED)
    return (ResNet3D("small") if preset == "demo" else ViT3D(SHAPES["base"], variant="vit_b")).eval()


def measure_sweeps(preset: str, where: str, again: int) -> dict[str, float]:
    """Two sweeps over the rows of a preset."""
    import torch

    from ctx_distill.training.row_features import CacheSettings, RowFeatures

    torch.set_num_threads(1)
    encode = preset == "demo" or where == "computed again"
    rows = ROWS[preset] if preset == "demo" or not encode else again
    encoder = encoder_of(preset) if encode else None
    tokens = [length // (16 if preset == "demo" else 8) for length in SHAPES[preset]]
    stand_in = torch.randn(1, 1 + tokens[0] * tokens[1] * tokens[2], 768)
    volumes = torch.rand(rows if preset == "demo" else 1, 1, *SHAPES[preset]) * 2 - 1

    @torch.no_grad()
    def compute(row: int) -> torch.Tensor:
        if encoder is None:
            return stand_in + row
        output = encoder(volumes[row % len(volumes)][None])
        return torch.cat([output.pooled[:, None], output.tokens], dim=1)

    def sweep(features: RowFeatures) -> float:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(SEED)).tolist()
        sums = 0.0
        for at in range(0, rows, BATCH[preset]):
            batch = order[at : at + BATCH[preset]]
            sums += float(features.get(batch, lambda new, b=batch: compute(*b[new])).sum())
        return sums

    if preset == "demo":
        compute(0)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        features = RowFeatures(CacheSettings(**LIMITS[where]))
        trainer: Any = SimpleNamespace(local_rank=0, node_rank=0, default_root_dir=folder)
        features.open_disk(trainer, range(rows))
        sums: list[float] = []
        found = {"megabytes": measure(lambda: sums.append(sweep(features)))["megabytes"], "rows": rows}
        found["row_bytes"], scratch = features._row_bytes, features._scratch
        found["disk_megabytes"] = 0.0
        if scratch is not None:
            descriptor = scratch._file.fileno()
            found["disk_megabytes"] = os.fstat(descriptor).st_blocks * 512 / 2**20
            if where == "disk, cold":
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        start, work = time.perf_counter(), time.process_time()
        sums.append(sweep(features))
        found["clock"], found["seconds"] = (time.perf_counter() - start) / rows, (time.process_time() - work) / rows
        assert sums[0] == sums[1]
        features.close()
    return found


def in_its_own_process(**arguments: Any) -> dict[str, float]:
    """Run `measure_sweeps` in a fresh process."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, __file__, "--measure", json.dumps(arguments)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    result: dict[str, float] = json.loads(printed.splitlines()[-1])
    return result


def report(again: int) -> None:
    """Measure everything and print it as it comes."""
    import torch

    print(f"{os.cpu_count()} CPU cores, torch {torch.__version__}, one thread, seed {SEED}\n")
    print(f"{'preset':<8}{'rows':>5}  {'bytes/row':>11}  {'kept':<16}{'grows by MB':>12}{'disk MB':>9}"
          f"{'CPU ms/row':>12}{'clock ms/row':>14}", flush=True)  # fmt: skip
    for preset in ROWS:
        for where in LIMITS:
            found = in_its_own_process(preset=preset, where=where, again=again)
            print(f"{preset:<8}{found['rows']:>5.0f}  {found['row_bytes']:>11,.0f}  {where:<16}{found['megabytes']:>12,.0f}"
                  f"{found['disk_megabytes']:>9,.0f}{1000 * found['seconds']:>12,.2f}"
                  f"{1000 * found['clock']:>14,.2f}", flush=True)  # fmt: skip


def main() -> None:
    """Print the report, or, as a child of it, one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", type=int, default=1, help="volumes of `base` that are encoded")
    parser.add_argument("--measure", metavar="JSON", help="arguments of one measurement")
    given = parser.parse_args()
    if given.measure is None:
        report(given.again)
        return
    print(json.dumps(measure_sweeps(**json.loads(given.measure))))


if __name__ == "__main__":
    main()
