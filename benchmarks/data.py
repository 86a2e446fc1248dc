"""Volumes a second and memory of reading CTs: this project beside MONAI, TorchIO and SimpleITK, and the floor.

    make bench-data          (or: python benchmarks/data.py)

Every row is measured in a process of its own, on the same files, with one thread and the same malloc settings, page cache
warm. Seconds are those of the CPU, so that other work on the machine does not show in them, and medians over repeats.
Memory is the most that one volume adds to the process (resident set). Prepares to 96 x 192 x 192 voxels of 3 x 1.5 x 1.5 mm.
Writes every row to runs/bench/data.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_peers import SHAPE, SPACING, WINDOW, monai, simpleitk, torchio
from large_batch import measure

OUT = Path("runs/bench")
REAL = Path("../shared/data/real_mini/ct")
REPEATS = 5
PREPARED = 128
SEED = 0
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
FLOOR = ("deflate", "isal", "zlib")
GZIPPED = tuple(f"floor_{name}" for name in FLOOR)
"""Rows that only a gzipped NIfTI has."""


def synthetic_ct(path: Path) -> None:
    """A 512 x 512 x 300 int16 CT of 0.7 x 0.7 x 1 mm, with the noise that makes a real one compress to about half."""
    import nibabel as nib
    import numpy as np
    from scipy.ndimage import gaussian_filter

    z, y, x = np.mgrid[0:300, 0:512:4, 0:512:4]
    body = ((x - 256) / 220) ** 2 + ((y - 256) / 160) ** 2 < 1
    lungs = [((x - at) / 90) ** 2 + ((y - 256) / 120) ** 2 < 1 for at in (150, 362)]
    hu = np.where(body, 40, -1000).astype(np.float32)
    hu[(lungs[0] | lungs[1]) & (z > 20) & (z < 280)] = -850
    hu = hu.repeat(4, axis=1).repeat(4, axis=2)
    noise = np.random.default_rng(SEED).standard_normal(hu.shape, dtype=np.float32)
    hu += gaussian_filter(noise, (0, 0.7, 0.7)) * np.where(hu > -999, 70, 10).astype(np.float32)
    voxels = np.clip(hu.round(), -1024, 3071).astype(np.int16)
    affine = np.diag([-0.7, -0.7, 1.0, 1.0])
    affine[:3, 3] = (179.0, 179.0, -150.0)
    nib.save(nib.Nifti1Image(voxels.transpose(2, 1, 0), affine), path)


def floor(inflater: str) -> Callable[[Path], Any]:
    """The file read and inflated, and nothing else."""
    import deflate
    from isal import isal_zlib

    def inflate(path: Path) -> Any:
        packed = path.read_bytes()
        if inflater == "deflate":
            return deflate.gzip_decompress(packed)
        if inflater == "isal":
            size = int.from_bytes(packed[-4:], "little")
            return isal_zlib.decompress(packed, wbits=31, bufsize=size)
        return zlib.decompress(packed, wbits=31)

    return inflate


def read_alone(path: Path) -> Any:
    """Every byte of the file, or of the folder's files."""
    return [file.read_bytes() for file in ([path] if path.is_file() else sorted(path.iterdir()))]


def copied(path: Path) -> Callable[[Path], Any]:
    """The inflated voxels copied once in memory."""
    import numpy as np

    from ctx_distill.data.io.volume import read_volume

    voxels = read_volume(path).voxels
    return lambda _: np.array(voxels)


def ours(antialias: bool) -> Callable[[Path], Any]:
    """This project's raw path."""
    from ctx_distill.data.transforms.model_volume import VolumeSpec, load_ct

    spec = VolumeSpec(spacing=SPACING, shape=SHAPE, window=WINDOW, antialias=antialias)
    return lambda path: load_ct(path, spec)


ROWS: dict[str, tuple[str, Callable[[Path], Callable[[Path], Any]]]] = {
    "floor_deflate": ("floor: read and inflate, libdeflate", lambda _: floor("deflate")),
    "floor_isal": ("floor: read and inflate, isal", lambda _: floor("isal")),
    "floor_zlib": ("floor: read and inflate, zlib", lambda _: floor("zlib")),
    "floor_read": ("floor: read the bytes", lambda _: read_alone),
    "copy": ("floor: one copy of the voxels in memory", copied),
    "raw": ("ctx-distill, raw, no anti-aliasing", lambda _: ours(False)),
    "raw_antialias": ("ctx-distill, raw, anti-aliasing (the default)", lambda _: ours(True)),
    "simpleitk": ("SimpleITK, read and one Resample", lambda _: simpleitk()),
    "monai": ("MONAI Dataset, five transforms", lambda _: monai("Dataset")),
    "monai_lazy": ("MONAI Dataset, five transforms, lazy", lambda _: monai("lazy")),
    "torchio": ("TorchIO", lambda _: torchio()),
    "monai_persistent": ("MONAI PersistentDataset, filled", lambda _: monai("PersistentDataset")),
    "monai_cache": ("MONAI CacheDataset, filled", lambda _: monai("CacheDataset")),
}


def measure_row(name: str, path: str, repeats: int) -> dict[str, float]:
    """Median CPU seconds a volume and the peak of memory in MB that the first measured one adds."""
    import torch

    torch.set_num_threads(1)
    load = ROWS[name][1](Path(path))
    load(Path(path))
    found = [measure(lambda: load(Path(path))) for _ in range(repeats)]
    return {
        "seconds": statistics.median(one["seconds"] for one in found),
        "megabytes": max(one["megabytes"] for one in found),
    }


def measure_prepared(path: str, workers: int, repeats: int) -> dict[str, float]:
    """Volumes a second of the prepared form as collated float32 batches, every voxel summed in this process."""
    import psutil
    import torch

    from ctx_distill.data.io.scan_file import ScanFile
    from ctx_distill.data.loading.datamodules import CTDataModule
    from ctx_distill.data.loading.prepared import PreparedFolder
    from ctx_distill.data.transforms.model_volume import VolumeSpec

    torch.set_num_threads(1)
    folder = Path(path).parent
    spec = VolumeSpec(spacing=SPACING, shape=SHAPE, window=WINDOW, stored="int16")
    manifest = folder / "ct.csv"
    rows = [f"s{n},p{n},train,{Path(path).name},,finding {n}" for n in range(PREPARED)]
    manifest.write_text("study_id,patient_id,split,image_path,findings,impression\n" + "\n".join(rows) + "\n")
    prepared = PreparedFolder.create(folder / "prepared", spec, projection=False)
    for number in range(PREPARED):
        if not prepared.is_complete(f"s{number}", ScanFile(Path(path))):
            prepared.write(f"s{number}", ScanFile(Path(path)))
    module = CTDataModule(str(manifest), spec, eval_batch_size=8, num_workers=workers, prepared=str(prepared.folder))
    loader = module.loader(module.manifest)
    me = psutil.Process()

    def work() -> float:
        times = [one.cpu_times() for one in (me, *me.children(recursive=True))]
        return sum(one.user + one.system for one in times)

    def epoch() -> tuple[float, float]:
        clock = cpu = 0.0
        for number, batch in enumerate(loader):
            if number == 0:  # the workers' start is no part of reading
                clock, cpu = time.perf_counter(), work()
                continue
            float(batch.volume.sum())
        counted = PREPARED - 8
        return counted / (time.perf_counter() - clock), counted / max(work() - cpu, 1e-6)

    for _ in range(3):  # checksums are compared, the page cache and the allocator are warm
        epoch()
    found = [epoch() for _ in range(repeats)]
    return {"per_second": statistics.median(f[0] for f in found), "per_core": statistics.median(f[1] for f in found)}


def in_its_own_process(name: str, path: Path, repeats: int) -> dict[str, Any]:
    """`measure_row` in a fresh process with one thread, or `error`, where another library cannot read the file."""
    command = [sys.executable, __file__, "--measure", name, str(path), str(repeats)]
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        if name.startswith(("monai", "torchio", "simpleitk")):
            return {"error": "cannot read it: " + done.stderr.strip().splitlines()[-1].partition(" <")[0][:100]}
        raise SystemExit(f"{name}: {done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def prepared_rows(made: Path, repeats: int) -> dict[str, dict[str, Any]]:
    """The prepared path with 0 and 2 workers, printed."""
    print(f"\nprepared, {' x '.join(map(str, SHAPE))}, page cache warm, float32 batches of 8, every voxel summed")
    found = {}
    for workers in (0, 2):
        row = found[f"prepared_{workers}_workers"] = in_its_own_process(f"prepared_{workers}", made, repeats)
        print(f"{workers} workers: {row['per_second']:.0f} volumes/s by the clock, {row['per_core']:.0f} a core-second")
    return found


def report(repeats: int) -> None:
    """Measure every row on every file, print them, and write them with their ratios."""
    import monai as monai_package
    import SimpleITK as sitk
    import torch
    import torchio as torchio_package

    versions = {"torch": torch.__version__, "monai": monai_package.__version__, "torchio": torchio_package.__version__,
                "SimpleITK": sitk.Version_VersionString()}  # fmt: skip
    print(f"{os.cpu_count()} CPU cores, one thread; " + ", ".join(f"{k} {v}" for k, v in versions.items()), flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    made = OUT / "ct_512x512x300.nii.gz"
    if not made.is_file():
        partial = made.with_name("partial.nii.gz")
        synthetic_ct(partial)
        partial.replace(made)
    files = [made, *sorted(REAL.glob("*"))]
    if len(files) == 1:
        print(f"{REAL} is absent: the synthetic CT alone")
    rows = []
    for path in files:
        size = sum(len(part) for part in read_alone(path)) / 1e6
        print(f"\n{path.name} ({size:.0f} MB)\n{'':<48}{'ms':>8}{'volumes/s':>11}{'peak MB':>9}")
        for name, (title, _) in ROWS.items():
            if name in GZIPPED and path.suffix != ".gz":
                continue
            found = in_its_own_process(name, path, repeats)
            if "error" in found:
                print(f"{title:<48}{found['error']}", flush=True)
                rows.append({"file": path.name, "row": name, **found})
                continue
            rows.append({"file": path.name, "row": name, **found})
            rate = 1 / max(found["seconds"], 1e-6)
            print(f"{title:<48}{found['seconds'] * 1e3:>8.1f}{rate:>11.2f}{found['megabytes']:>9.0f}", flush=True)
    first = {row["row"]: float(row["seconds"]) for row in rows if row["file"] == made.name}
    base = min(first[f"floor_{name}"] for name in FLOOR)
    ratios = {
        "raw_vs_monai": first["monai"] / first["raw"],
        "raw_antialias_vs_monai": first["monai"] / first["raw_antialias"],
        "raw_vs_floor": first["raw"] / base,
        "raw_antialias_vs_floor": first["raw_antialias"] / base,
    }
    prepared = prepared_rows(made, repeats)
    ratios["prepared_per_second"] = prepared["prepared_0_workers"]["per_second"]
    rows += [{"file": made.name, "row": name, **row} for name, row in prepared.items()]
    print("\n" + "\n".join(f"{name}: {value:.2f}" for name, value in ratios.items()))
    cores = math.ceil(10 * first["raw_antialias"])
    print(f"A GPU that takes 10 such volumes a second keeps {cores} cores busy with the raw path.")
    table = {**ratios, "versions": versions, "repeats": repeats, "seed": SEED, "rows": rows}
    partial = OUT / "data.json.partial"
    partial.write_text(json.dumps(table, indent=1) + "\n")
    shutil.move(partial, OUT / "data.json")


def main() -> None:
    """Print the report, or, as a child of it, one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="measurements a row (default: %(default)s)")
    parser.add_argument("--measure", nargs=3, metavar=("ROW", "FILE", "REPEATS"), help="one row, as JSON")
    given = parser.parse_args()
    if given.measure is None:
        report(given.repeats)
        return
    name, path, repeats = given.measure
    kind, _, workers = name.partition("_")
    found = (
        measure_prepared(path, int(workers), int(repeats))
        if kind == "prepared"
        else measure_row(name, path, int(repeats))
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
