"""Seconds and memory until a run over a large manifest is ready to train: the first time, and from the caches.

    make bench-manifest                                  (or: python benchmarks/manifest.py)
    make bench-manifest ARGS="--rows 1000000"
    make bench-manifest ARGS="--against FOLDER"          another version of the package, side by side

Every line is a process of its own that does what stage 3 does before its first step: construct `CTDataModule`, choose the
training rows (three times, as a stage asks), take study codes and the order of an epoch, and extract the findings of the
training reports. Peak memory is the resident set of that process, libraries and mapped files included; worker processes
are counted in a column of their own. CPU seconds are of the process and its workers together: other work on the machine
does not show in them. The images are hard links to 20 files of 20 bytes, so that opening them costs what the file system costs.

Reports have 12 sentences of about 12 words. `repeated`: the sentences are drawn with Zipf's law (exponent 1) from 50,000, a third of
which carry a measurement of their own in every tenth report. `distinct`: nearly every sentence is another one, as numbers and words are drawn anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SEED = 0
SENTENCES = 12
BANK = 50_000
FILES = 20
FINDINGS = (
    "pleural effusion", "a pulmonary nodule", "consolidation", "atelectasis", "emphysema", "bronchiectasis", "cardiomegaly",
    "a hiatal hernia", "mediastinal lymphadenopathy", "ground-glass opacity", "a pericardial effusion", "calcified plaques",
    "interlobular septal thickening", "a mosaic attenuation pattern", "peribronchial thickening", "fibrotic sequelae",
)  # fmt: skip
OPENINGS = (
    "There is",
    "No evidence of",
    "Stable",
    "New",
    "Minimal",
    "There is no",
    "Mild",
    "Suspicious for",
    "Resolved",
)
PLACES = ("in the right upper lobe", "in the left lower lobe", "in the lingula", "bilaterally", "at both bases",
          "in the middle lobe", "along the aortic arch", "in the prevascular area", "adjacent to the fissure")  # fmt: skip
TAILS = ("compared with the previous examination", "without significant change", "and clinical correlation is advised",
         "as described above", "which was seen before", "within normal limits elsewhere", "on this non-contrast study")  # fmt: skip


def sentence(draw: Any, measured: bool) -> str:
    """One sentence of a report, with a measurement where asked."""
    parts = [draw.choice(OPENINGS), draw.choice(FINDINGS), draw.choice(PLACES)]
    if measured:
        parts.append(f"measuring {draw.uniform(1, 60):.2f} x {draw.uniform(1, 60):.2f} mm")
    return " ".join([*parts, draw.choice(TAILS)]) + f" (series {draw.randrange(1, 900)})."


def reports(rows: int, distinct: bool) -> Iterator[tuple[str, str]]:
    """Findings and impression of each row."""
    import itertools
    import random

    draw = random.Random(SEED)
    bank = [sentence(draw, number % 3 == 0) for number in range(BANK)]
    weights = list(itertools.accumulate(1 / place for place in range(1, BANK + 1)))
    for row in range(rows):
        if distinct:
            chosen = [sentence(draw, True) for _ in range(SENTENCES)]
        else:
            chosen = draw.choices(bank, cum_weights=weights, k=SENTENCES)
            if row % 10 == 0:
                chosen = [text.replace("measuring", f"measuring {draw.uniform(1, 60):.1f} to") for text in chosen]
        yield " ".join(chosen[:-2]), " ".join(chosen[-2:])


def write_manifest(folder: Path, rows: int, distinct: bool) -> Path:
    """A manifest of `rows` scans with an 18-label set, and its images."""
    import csv

    labels = [f"label:finding {number}" for number in range(18)]
    names = ["study_id", "patient_id", "split", "image_path", "findings", "impression", "image_id", *labels]
    path = folder / "ct.csv"
    sources = []
    for number in range(FILES):
        (folder / f"source-{number}").write_bytes(b"\x1f\x8b" + bytes(18))
        sources.append(folder / f"source-{number}")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row, (findings, impression) in enumerate(reports(rows, distinct)):
            image = f"ct/{row // 1000:04d}/{row:07d}.nii.gz"
            if row % 1000 == 0:
                (folder / image).parent.mkdir(parents=True)
            os.link(sources[row // (rows // FILES + 1)], folder / image)
            split = ("val", "test")[row % 20] if row % 20 < 2 else "train"
            marks = ["1" if (row * (number + 7)) % 11 == 0 else "0" for number in range(18)]
            writer.writerow([f"s{row:07d}", f"p{row:07d}", split, image, findings, impression, f"i{row:07d}", *marks])
    return path


def peak_mb() -> float:
    """Peak of this process's resident set in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def cpu() -> float:
    """CPU seconds of this process and of its finished workers."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def make_ready(path: Path, vocabulary: str) -> dict[str, Any]:
    """Everything before the first step, part by part: seconds of the clock, CPU seconds, peak memory so far."""
    start, work = time.perf_counter(), cpu()
    parts: dict[str, Any] = {}

    def part(name: str, step: Callable[[], Any]) -> Any:
        clock, used = time.perf_counter(), cpu()
        value = step()
        parts[name] = {"seconds": time.perf_counter() - clock, "cpu": cpu() - used, "peak_mb": peak_mb()}
        return value

    def imports() -> Any:
        from ctx_distill.data.loading.datamodules import CTDataModule
        from ctx_distill.data.transforms.model_volume import VolumeSpec

        return CTDataModule, VolumeSpec

    data_module, spec = part("imports", imports)
    volume = spec(spacing=(3.0, 1.5, 1.5), shape=(96, 192, 192))
    module = part("CTDataModule", lambda: data_module(str(path), volume, text="required"))
    train = part("training_rows, 3 times", lambda: [module.training_rows() for _ in range(3)][-1])
    part(
        "study codes, order, dataset",
        lambda: (train.study_codes(), list(module.order(train))[:8], module.dataset(train)),
    )
    part("describe (run.json)", module.describe)

    def extract() -> Any:
        try:
            from ctx_distill.stages.shared.shared_extraction import extract_shared
        except ImportError:  # a version of before it
            from ctx_distill.text.extractor import extract_many, load_vocabulary

            return extract_many([train.report(row) for row in train.frame.index], load_vocabulary(vocabulary))
        return extract_shared(train.reports(), vocabulary)

    found = part("findings of the training reports", extract)
    import hashlib

    parts["total"] = {"seconds": time.perf_counter() - start, "cpu": cpu() - work, "peak_mb": peak_mb()}
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"parts": parts, "worker_mb": workers, "findings": hashlib.sha256(found.tobytes()).hexdigest()[:16]}


def in_process(path: Path, vocabulary: str, package: str | None) -> dict[str, Any]:
    """`make_ready` in a fresh process, under another version of the package where one is given."""
    environment = {**os.environ, **({"PYTHONPATH": package} if package else {})}
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(path), "--vocabulary", vocabulary]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def show(title: str, result: dict[str, Any]) -> None:
    """Print one table."""
    print(f"\n{title}\n{'':36}{'seconds':>10}{'CPU s':>10}{'peak MB':>10}")
    for name, values in result["parts"].items():
        print(f"{name:36}{values['seconds']:10.1f}{values['cpu']:10.1f}{values['peak_mb']:10.0f}")
    print(f"largest worker process: {result['worker_mb']:.0f} MB; findings {result['findings']}", flush=True)


def main() -> None:
    """Write the manifests, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--texts", choices=("repeated", "distinct"), nargs="*", default=["repeated", "distinct"])
    parser.add_argument("--vocabulary", default="ct-rate")
    parser.add_argument("--against", help="folder that holds another version of ctx_distill/")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(make_ready(arguments.measure, arguments.vocabulary)))
        return
    print(f"{arguments.rows:,} rows, seed {SEED}; {os.cpu_count()} CPU cores, Python {platform.python_version()}")
    for texts in arguments.texts:
        with tempfile.TemporaryDirectory() as scratch:
            path = write_manifest(Path(scratch), arguments.rows, texts == "distinct")
            print(f"\n{texts} sentences: {path.stat().st_size / 1e6:.0f} MB", flush=True)
            results = {"the first time": in_process(path, arguments.vocabulary, None)}
            results["again, from the caches"] = in_process(path, arguments.vocabulary, None)
            if arguments.against:
                results["the version to compare with"] = in_process(path, arguments.vocabulary, arguments.against)
            for title, result in results.items():
                show(f"{texts}, {title}", result)
            assert len({result["findings"] for result in results.values()}) == 1
            if arguments.against:
                first, again, before = (result["parts"]["total"]["cpu"] for result in results.values())
                print(
                    f"CPU seconds, before against now: {before / first:.1f} times the first, {before / again:.1f} again"
                )


if __name__ == "__main__":
    main()
