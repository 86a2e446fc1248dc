"""Build time, lookup time, recall and memory of the X-ray index, for planning: `make bench-index`.

Every row is a process of its own. Keys are unit rows drawn around random centres, as embeddings of reports lie; queries
are keys disturbed by noise. Builds use all threads given; lookups use one, and what is printed of them is the median of
their CPU time, which other work on the machine disturbs least. Recall@1 is measured against the exact search. Memory:
`build MB` is the most that building adds to the process beside the keys; `file MB` the index on disk, which is what the
ranks of one host share once it is memory-mapped; `own MB` what a rank that searches adds to that for itself.

`--step` measures instead what the lookup of a batch costs beside its training step at the size of the preset `base`: a
ViT-B on 96 x 192 x 192 voxels, forward, backward and AdamW; and, of the same batch, new views of reports of some 300
tokens embedded by a text tower of 6 layers of 512, searched among the keys, re-ranked by findings, and fetched. One
thread, CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ctx_distill.files import write_json

SEED = 0
DIMENSION = 512
CENTRES = 4000
QUERIES = 256
NEIGHBOURS = 8
BATCHES = (1, 32, 128)
KINDS = ("exact", "ivf", "hnsw")
OUT = Path(__file__).parents[1] / "runs" / "bench"


def keys_and_queries(rows: int, number: int = QUERIES) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(rows, 512) and (number, 512) unit rows; the same for the same numbers."""
    draw = np.random.default_rng(SEED)
    centres = draw.standard_normal((CENTRES, DIMENSION), dtype=np.float32)
    keys = np.empty((rows, DIMENSION), dtype=np.float32)
    for start in range(0, rows, 100_000):
        part = keys[start : start + 100_000]
        part[:] = centres[draw.integers(0, CENTRES, len(part))]
        part += draw.standard_normal(part.shape, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    chosen = keys[draw.choice(rows, number, replace=False)]
    noise = draw.standard_normal(chosen.shape, dtype=np.float32) * np.float32(0.5 / DIMENSION**0.5)
    queries = chosen + noise
    return keys, queries / np.linalg.norm(queries, axis=1, keepdims=True)


def memory_mb(field: str) -> float:
    """A line of this process's status: VmHWM is the peak, RssAnon what no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def measure(kind: str, rows: int, threads: int, repeats: int, width: int | None) -> dict[str, float]:
    """One row of the table."""
    import torch

    from ctx_distill.retrieval.build_index import construct, recall_at_1
    from ctx_distill.retrieval.index import XrayIndex, faiss_module

    faiss = faiss_module()
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    keys, queries = keys_and_queries(rows)
    asked = torch.from_numpy(queries)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew here
    before, wall, cpu = memory_mb("VmRSS"), time.perf_counter(), time.process_time()
    built = construct(keys, kind, device="cpu", search_width=width)  # type: ignore[arg-type]
    result = {"build_s": time.perf_counter() - wall, "build_cpu_s": time.process_time() - cpu}
    result["build_peak_mb"] = memory_mb("VmHWM") - before
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.faiss"
        built.save(path)
        result["file_mb"] = path.stat().st_size / 1e6
        del built
        result["recall_at_1"] = recall_at_1(XrayIndex.load(path, device="cpu"), keys, asked)
        faiss.omp_set_num_threads(1)
        before = memory_mb("RssAnon")
        index = XrayIndex.load(path, device="cpu")
        for batch in BATCHES:
            walls, cpus = [], []
            for repeat in range(repeats + 1):
                part = asked[(repeat * batch) % (QUERIES - batch + 1) :][:batch]
                wall, cpu = time.perf_counter(), time.process_time()
                index.search(part, NEIGHBOURS)
                walls.append(time.perf_counter() - wall)
                cpus.append(time.process_time() - cpu)
            result[f"lookup_{batch}_ms"] = statistics.median(walls[1:]) * 1e3
            result[f"lookup_{batch}_cpu_ms"] = statistics.median(cpus[1:]) * 1e3
        result["own_mb"] = memory_mb("RssAnon") - before
    return result


def reports(number: int, names: list[str]) -> list[str]:
    """So many reports of 30 sentences."""
    draw = np.random.default_rng(SEED)
    places = (
        "the right upper lobe",
        "the left lower lobe",
        "both lungs",
        "the mediastinum",
        "the imaged upper abdomen",
    )
    forms = ("There is {} in {}.", "No {} is seen in {}.", "Mild {} has not changed since the prior study in {}.")
    return [
        " ".join(str(draw.choice(forms)).format(draw.choice(names), draw.choice(places)) for _ in range(30))
        for _ in range(number)
    ]


def measure_step(kind: str, rows: int, batch: int) -> dict[str, float]:
    """CPU seconds of a step of `batch` volumes at base size, and of its lookup among `rows` keys."""
    import pandas as pd
    import torch

    from ctx_distill.losses.distillation import distillation_loss
    from ctx_distill.models.ct_encoder import ViT3D
    from ctx_distill.models.experts.open_clip_expert import make_expert_folder
    from ctx_distill.models.heads import ProjectionHead
    from ctx_distill.models.opening import open_expert
    from ctx_distill.retrieval.index import faiss_module
    from ctx_distill.retrieval.store import write_index_artefact
    from ctx_distill.stages.distill.targets import NeighbourSettings, RetrievedTeacher
    from ctx_distill.text.extractor import load_vocabulary
    from ctx_distill.training.row_features import ReportFeatures

    torch.set_num_threads(1)
    faiss_module().omp_set_num_threads(1)
    torch.manual_seed(SEED)
    names = load_vocabulary("ct-rate").names
    texts = reports(batch + 1, names)
    with tempfile.TemporaryDirectory() as folder:
        make_expert_folder(Path(folder, "expert"), reports(64, names), image_size=32, embed_dim=DIMENSION, vision="vit",
                           text_width=512, text_layers=6, context_length=128, vocab_size=8000)  # fmt: skip
        expert = open_expert(f"{folder}/expert")
        keys = torch.from_numpy(keys_and_queries(rows)[0])
        items = pd.DataFrame(dict.fromkeys(("study_id", "image_id", "patient_id", "row"), range(rows))).assign(
            split="train"
        )
        store = write_index_artefact(
            Path(folder, "index"), keys, keys, items.astype({"study_id": str}), {"xray-expert": expert.fingerprint()},
            {}, findings=torch.randint(0, 2, (rows, len(names))).float(), finding_names=names, kind=kind,  # type: ignore[arg-type]
        )  # fmt: skip
        del keys
        teacher = RetrievedTeacher(store, NeighbourSettings(rerank=True), "ct-rate", ReportFeatures(expert))
        spent = []
        for start in range(4):
            views = [text.split(". ", start + 1)[-1] for text in texts[:batch]]
            began = time.process_time()
            target = teacher.targets(torch.arange(batch), texts[:batch], views)
            spent.append(time.process_time() - began)
    encoder = ViT3D((96, 192, 192), variant="vit_b")
    head = ProjectionHead(encoder.embed_dim, DIMENSION)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-4)
    volume = torch.randn(batch, 1, 96, 192, 192)
    began = time.process_time()
    student = head(encoder(volume).pooled)
    distillation_loss(student, target, None, 0.07, {"pair": 1.0, "relation": 0.0})["total"].backward()
    optimizer.step()
    step, lookup = time.process_time() - began, statistics.median(spent[1:])
    return {"batch": batch, "step_cpu_s": step, "lookup_cpu_s": lookup, "lookup_share": lookup / (step + lookup)}


def main() -> None:
    """Print the table and write it, or, as a child, one row of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--width", type=int, default=None, help="search_width of the approximate kinds")
    parser.add_argument("--out", type=Path, default=OUT / "index.json")
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "ROWS"), default=None)
    parser.add_argument("--step", type=int, nargs="?", const=2, default=None, metavar="BATCH")
    options = parser.parse_args()
    if options.step:
        row = measure_step(options.kinds[0], options.rows[0], options.step)
        print(f"batch {options.step}, {options.rows[0]:,} keys, {options.kinds[0]}: step {row['step_cpu_s']:.1f} CPU s")
        print(f"lookup {1e3 * row['lookup_cpu_s']:.0f} CPU ms, {100 * row['lookup_share']:.2f} % of both together")
        return
    if options.measure:
        kind, rows = options.measure
        print(json.dumps(measure(kind, int(rows), options.threads, options.repeats, options.width)))
        return
    print(
        f"{DIMENSION} dimensions, float32, seed {SEED}; built with {options.threads} threads; lookups of {NEIGHBOURS} "
        f"neighbours with one thread, CPU ms a batch, medians of {options.repeats}"
    )
    head = f"{'rows':>9} {'kind':<6}{'build s':>9}{'CPU s':>8}{'build MB':>10}{'file MB':>9}{'own MB':>8}"
    print(head + "".join(f"{f'{batch}':>9}" for batch in BATCHES) + f"{'recall@1':>10}", flush=True)
    table = []
    for rows in options.rows:
        for kind in options.kinds:
            command = [sys.executable, __file__, "--measure", kind, str(rows), "--threads", str(options.threads)]
            command += ["--repeats", str(options.repeats)]
            command += ["--width", str(options.width)] if options.width else []
            environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "OPENBLAS_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"{kind}, {rows} rows: {done.stderr}")
            row = json.loads(done.stdout.splitlines()[-1])
            table.append({"rows": rows, "kind": kind, **row})
            line = f"{rows:>9,} {kind:<6}{row['build_s']:>9.1f}{row['build_cpu_s']:>8.1f}{row['build_peak_mb']:>10.0f}"
            line += f"{row['file_mb']:>9.0f}{row['own_mb']:>8.0f}"
            lookups = "".join(f"{row[f'lookup_{batch}_cpu_ms']:>9.2f}" for batch in BATCHES)
            print(f"{line}{lookups}{row['recall_at_1']:>10.3f}", flush=True)
    result = {"threads": options.threads, "seed": SEED, "dimension": DIMENSION, "rows": table}
    write_json(options.out, result)


if __name__ == "__main__":
    main()
