"""What stage 3's record of corrected pairs costs: `make bench-pairs`.

Global batches of studies of which 85 % are normal, so that most pairs are suspected and all of these tie. Per step, in
CPU seconds of one thread: the evidence and the correction; the loss with its gradient; the record; and the record that
takes every suspected pair to the host, as it did before it compared pairs on their device. The first step is apart: a
record that holds nothing yet has no bound to compare with.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ctx_distill.losses.contrastive import contrastive_loss, study_targets
from ctx_distill.losses.false_negatives import (
    Correction,
    contradictions,
    correct,
    findings_evidence,
    identify,
    report_evidence,
    retrieved_evidence,
)
from ctx_distill.losses.pair_order import study_identity
from ctx_distill.stages.align.corrected_pairs import CorrectedPairs

T = TypeVar("T")
OUT = Path(__file__).parents[1] / "runs" / "bench"
SEED, STUDIES, FINDINGS, DIMENSION = 0, 20_000, 18, 512
NORMALS, LABEL_NOISE = 0.85, 0.02
THRESHOLDS = {"findings": 1.0, "report": 0.5, "retrieved": 0.5}


class EveryPair(CorrectedPairs):
    """The record that takes every suspected pair to the host."""

    def _select(self, order: Tensor, contradicted: Tensor | None) -> tuple[Tensor, Tensor]:
        del contradicted
        i, j = (order >= 0).nonzero(as_tuple=True)
        return i, j


class Cohort:
    """Findings, labels and embeddings of studies."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(SEED)
        normal = torch.rand(STUDIES, generator=draw) < NORMALS
        shown = (torch.rand(STUDIES, FINDINGS, generator=draw) < 0.15).float()
        self.findings = torch.where(normal[:, None], 0.0, shown)
        wrong = torch.rand(STUDIES, FINDINGS, generator=draw) < LABEL_NOISE
        self.labels = torch.where(wrong, 1 - self.findings, self.findings)
        noise = 0.05 * torch.randn(STUDIES, DIMENSION, generator=draw)
        self.reports = F.normalize(self.findings @ torch.randn(FINDINGS, DIMENSION, generator=draw) + 1 + noise, dim=-1)
        self.identity = study_identity([f"study-{row}" for row in range(STUDIES)])
        self.draw = draw


def corrected(cohort: Cohort, rows: Tensor, kinds: tuple[str, ...]) -> tuple[Correction, dict[str, Tensor], Tensor]:
    """The correction of a batch, its evidence, and the pairs that labels contradict."""
    evidence: dict[str, Tensor] = {}
    for kind in kinds:
        if kind == "findings":
            evidence[kind] = findings_evidence(cohort.findings[rows])
        else:
            evidence[kind] = (report_evidence if kind == "report" else retrieved_evidence)(cohort.reports[rows])
    found, strength = identify(evidence, {kind: THRESHOLDS[kind] for kind in kinds})
    fix = correct(study_targets(rows), found, strength, "mask", identity=cohort.identity[rows])
    return fix, evidence, contradictions(cohort.labels[rows])


def loss(features: Tensor, fix: Correction) -> None:
    """The corrected loss of image and text features (2, B, D), and its gradient."""
    image, text = features.requires_grad_()
    terms = contrastive_loss(
        image, text, 20.0, targets=fix.targets, text_targets=fix.text_targets, denominator=fix.denominator
    )
    terms["total"].backward()


def measure(batch: int, steps: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    """CPU milliseconds of each part, per step."""
    cohort = Cohort()
    records = {"record": CorrectedPairs(kinds), "every pair": EveryPair(kinds)}
    parts: dict[str, list[float]] = {name: [] for name in ("correction", "loss", *records)}
    suspected = 0

    def timed(name: str, call: Callable[..., T], *given: Any) -> T:
        began = time.process_time()
        result = call(*given)
        parts[name].append(1000 * (time.process_time() - began))
        return result

    for _ in range(steps):
        rows = torch.randperm(STUDIES, generator=cohort.draw)[:batch]
        features = F.normalize(torch.randn(2, batch, DIMENSION, generator=cohort.draw), dim=-1)
        fix, evidence, contradicted = timed("correction", corrected, cohort, rows, kinds)
        timed("loss", loss, features, fix)
        for name, record in records.items():
            timed(name, record.observe, fix, evidence, rows, cohort.labels[rows], contradicted, 0)
        suspected = int(fix.suspected)
    one, other = (record.frame({n: str(n) for n in range(STUDIES)}, THRESHOLDS) for record in records.values())
    later = {name: median(values[1:]) for name, values in parts.items()}
    return {
        "batch": batch,
        "kinds": list(kinds),
        "suspected": suspected,
        "milliseconds": later,
        "first": {name: parts[name][0] for name in records},
        "of the loss and the correction": later["record"] / (later["loss"] + later["correction"]),
        "of every pair": later["record"] / later["every pair"],
        "same pairs": bool(one.equals(other)),
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 2048], metavar="B")
    parser.add_argument(
        "--steps", type=int, default=6, metavar="N", help="of each, the first is apart (default: %(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, CPU, one thread, seed {SEED}; CPU ms per step, median of {options.steps - 1}\n")
    print("| batch | evidence | suspected pairs | correction | loss | record | every pair | record / (correction + loss) |"
          " record / every pair | first step: record, every pair | same pairs |")  # fmt: skip
    print("| --- " * 11 + "|")
    results = []
    for batch in options.batches:
        for kinds in (("findings",), ("report", "findings", "retrieved")):
            found = measure(batch, options.steps, kinds)
            results.append(found)
            each, first = found["milliseconds"], found["first"]
            print(
                f"| {batch:,} | {', '.join(kinds)} | {found['suspected']:,} | {each['correction']:.0f} | {each['loss']:.0f} "
                f"| {each['record']:.1f} | {each['every pair']:.0f} | {found['of the loss and the correction']:.3f} "
                f"| {found['of every pair']:.4f} | {first['record']:.0f}, {first['every pair']:.0f} | {found['same pairs']} |",
                flush=True,
            )
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "corrected_pairs.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
