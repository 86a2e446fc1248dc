"""The findings extractor against labelled reports: development rows, held-out rows, Open-I's MeSH terms, speed.

    make bench-text ARGS="--reports FOLDER"       (or: python benchmarks/findings.py --reports FOLDER)

FOLDER holds `ct_reports_18_labels.csv` (CT-CLIP's text classifier) and `openi_NLMCXR_reports.tgz` (Open-I).
Rows 1 to 600 are for development, the others are held out, without those whose text stands among the first 600. Of
Open-I those reports are for development whose id has a SHA-256 with an even first byte, the others are held out.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import random
import re
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ctx_distill.metrics.bootstrap import bootstrap
from ctx_distill.sources.open_i import read_reports
from ctx_distill.text.extractor import extract_many, load_vocabulary
from ctx_distill.text.findings_table import write_findings
from ctx_distill.text.report_text import join_sections, split_sentences
from ctx_distill.text.sections import cut_report

SEED = 0
DEVELOPMENT = 600
FOLDS = 5
# CheXpert's observation -> a pattern of the MeSH terms (major) that stand for it; "No Finding" is the term "normal".
MESH = {
    "No Finding": r"normal$|No Indexing$",
    "Cardiomegaly": r"Cardiomegaly",
    "Lung Opacity": r"Opacity|Infiltrate|Airspace Disease|Consolidation",
    "Lung Lesion": r"Nodule|Mass|Granuloma|Lung Neoplasms",
    "Edema": r"Pulmonary Edema|Pulmonary Congestion|Heart Failure",
    "Consolidation": r"Consolidation",
    "Pneumonia": r"Pneumonia",
    "Atelectasis": r"Pulmonary Atelectasis|Atelectasis",
    "Pneumothorax": r"Pneumothorax|Hydropneumothorax",
    "Pleural Effusion": r"Pleural Effusion|Costophrenic Angle/.*blunted",
    "Fracture": r"Fractures",
    "Support Devices": r"Catheters|Medical Device|Implanted|Tube|Stents|Surgical Instruments|Pacemaker",
}
# Where the terms mean something else than CheXpert's observation does: a false positive with such a term, and a false negative
# whose terms of the finding are all of this kind, are differences of definition.
DEFINITION = {
    "No Finding": (
        r"Lung/hypoinflation|Markings|Technical Quality|Spondylosis|Sutures|Breast Implants|Aorta/tortuous|Foreign Bodies|"
        + MESH["Support Devices"],
        r"$^",
    ),
    "Cardiomegaly": (r"Cardiac Shadow/enlarged", r"Cardiomegaly/borderline"),
    "Lung Lesion": (r"(Opacity|Density)/.*round|Calcified Granuloma", r"Granuloma"),
    "Pneumonia": (r"Infiltrate|Opacity|Airspace Disease|Consolidation", r"$^"),
    "Pleural Effusion": (r"$^", r"Costophrenic Angle"),
}
Bools = NDArray[np.bool_]


def scores(true: Bools, said: Bools) -> tuple[int, int, int, float, float, float]:
    """True and false positives, false negatives, precision, recall, F1 (NaN without any)."""
    tp, fp, fn = int((true & said).sum()), int((~true & said).sum()), int((true & ~said).sum())
    f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else float("nan")
    return tp, fp, fn, tp / max(tp + fp, 1), tp / max(tp + fn, 1), f1


def table(title: str, names: list[str], true: Bools, said: Bools) -> None:
    """Print confusions a finding, and the macro F1 with its interval over reports."""
    print(f"\n{title}: {len(true)} reports\n| finding | positives | TP | FP | FN | precision | recall | F1 [95 %] |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    groups = np.arange(len(true))
    for i, name in enumerate(names):
        tp, fp, fn, precision, recall, f1 = scores(true[:, i], said[:, i])
        band = bootstrap(lambda rows, i=i: scores(true[rows, i], said[rows, i])[5], groups, seed=SEED)  # type: ignore[misc]
        low, high = (band.low or 0.0, band.high or 0.0)
        print(
            f"| {name} | {true[:, i].sum()} | {tp} | {fp} | {fn} | {precision:.3f} | {recall:.3f} | {f1:.3f} [{low:.3f}, {high:.3f}] |"
        )

    def macro(rows: NDArray[np.intp]) -> float:
        return float(np.nanmean([scores(true[rows, i], said[rows, i])[5] for i in range(len(names))]))

    whole = bootstrap(macro, groups, seed=SEED)
    print(f"macro F1 {whole.value:.3f} [{whole.low:.3f}, {whole.high:.3f}]")


def folds(names: list[str], true: Bools, said: Bools) -> None:
    """F1 a finding over folds: nothing is fitted, so each fold is read by the same rules; the spread is what is told."""
    fold = np.random.default_rng(SEED).permutation(len(true)) % FOLDS
    print(f"\n{FOLDS} folds (seed {SEED}), F1: mean, lowest")
    for i, name in enumerate(names):
        each = [scores(true[fold == k, i], said[fold == k, i])[5] for k in range(FOLDS)]
        print(f"| {name} | {np.nanmean(each):.3f} | {np.nanmin(each):.3f} |")


def labelled(folder: Path, held_out: bool) -> None:
    """The 18 labels, on the development rows or on the others."""
    with (folder / "ct_reports_18_labels.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    first = {row["report_text"].strip() for row in rows[:DEVELOPMENT]}
    chosen = (
        [row for row in rows[DEVELOPMENT:] if row["report_text"].strip() not in first]
        if held_out
        else rows[:DEVELOPMENT]
    )
    vocabulary = load_vocabulary("ct-rate")
    texts = [join_sections(*cut_report(row["report_text"])) for row in chosen]
    said = extract_many(texts, vocabulary) == 1
    true = np.array([[float(row[name]) == 1 for name in vocabulary.names] for row in chosen])
    table("held-out rows" if held_out else "development rows", vocabulary.names, true, said)
    if not held_out:
        folds(vocabulary.names, true, said)


def is_held_out(uid: str) -> bool:
    """Which half of Open-I a report is of."""
    return hashlib.sha256(uid.encode()).digest()[0] % 2 == 1


def openi(folder: Path, held_out: bool) -> None:
    """CheXpert's observations against the MeSH terms of one half of Open-I's reports, and what its errors are."""
    vocabulary = load_vocabulary("chexpert")
    reports = [r for r in read_reports(folder / "openi_NLMCXR_reports.tgz") if is_held_out(r.uid) == held_out]
    texts = [join_sections(r.findings, r.impression) for r in reports]
    names = list(MESH)
    values = extract_many(texts, vocabulary)[:, [vocabulary.names.index(name) for name in names]]
    said = values == 1
    terms = [[[t for t in r.mesh if re.match(MESH[name], t, re.I)] for name in names] for r in reports]
    true = np.array([[bool(named) for named in row] for row in terms])
    table(f"Open-I against MeSH, {'held-out' if held_out else 'development'} half", names, true, said)
    print(
        "\n| finding | FP | of them definition | FN | definition | read as uncertain | no text |\n" + "| --- " * 7 + "|"
    )
    for i, name in enumerate(names):
        here, missed = DEFINITION.get(name, (r"$^", r"$^"))
        fp, fn = np.flatnonzero(said[:, i] & ~true[:, i]), np.flatnonzero(~said[:, i] & true[:, i])
        by_fp = sum(any(re.match(here, term, re.I) for term in reports[r].mesh) for r in fp)
        by_fn = sum(all(re.match(missed, term, re.I) for term in terms[r][i]) for r in fn)
        doubt, blank = sum(values[r, i] == -1 for r in fn), sum(not texts[r] for r in fn)
        print(f"| {name} | {len(fp)} | {by_fp} | {len(fn)} | {by_fn} | {doubt} | {blank} |")


def speed(folder: Path, count: int) -> None:
    """Seconds for `count` reports of shuffled sentences, each sentence made unique so that none is remembered."""
    with (folder / "ct_reports_18_labels.csv").open(encoding="utf-8-sig", newline="") as file:
        texts = [row["report_text"] for row in csv.DictReader(file)]
    texts += [f"{r.findings} {r.impression}" for r in read_reports(folder / "openi_NLMCXR_reports.tgz")]
    draw, made = random.Random(SEED), []
    split = [split_sentences(text) for text in texts]
    for i in range(count):
        sentences = list(split[i % len(split)])
        draw.shuffle(sentences)
        made.append(" ".join(f"{text.rstrip('.')} {draw.randrange(10**9)}." for text in sentences))
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "in.csv"
        with source.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["report_text"])
            writer.writerows([text] for text in made)
        begun = time.perf_counter()
        before = [sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        write_findings(source, Path(scratch) / "out.csv", "ct-rate", workers=2)
        after = [sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        print(
            f"\n{count} reports: {time.perf_counter() - begun:.0f} s of the clock, {sum(after) - sum(before):.0f} CPU s"
        )


def main() -> None:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=Path, default=Path("../shared/data/reports"), metavar="FOLDER")
    parser.add_argument("--only", choices=("development", "held-out", "openi", "openi-held-out", "speed"), default=None)
    parser.add_argument("--count", type=int, default=50000, metavar="N", help="reports of the speed test")
    options = parser.parse_args()
    if options.only in (None, "development"):
        labelled(options.reports, held_out=False)
    if options.only in (None, "held-out"):
        labelled(options.reports, held_out=True)
    if options.only in (None, "openi"):
        openi(options.reports, held_out=False)
    if options.only in (None, "openi-held-out"):
        openi(options.reports, held_out=True)
    if options.only in (None, "speed"):
        speed(options.reports, options.count)


if __name__ == "__main__":
    main()
