"""The section on pairs that stage 3 corrected as false negatives, evaluated with the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ctx_distill.reporting.pictures import CTPictures
from ctx_distill.reporting.studies_section import label_table, read_ct, shared_runs
from ctx_distill.runs.run_reader import Run, mapping, to_number

if TYPE_CHECKING:
    from ctx_distill.data.manifests.manifest import Manifest

STRONG, BORDERLINE, WRONG = 3, 1, 2
EPOCHS = 8
RULE = (
    "Selected by rule: the strongest corrected pairs whose reports are not identical, with ties broken by the number of findings; the "
    "weakest pair, if strengths differ; and the strongest pairs that the labels contradict. No study is shown twice."
)
_EVIDENCE = {
    "report": "similarity of the reports: {value:.2f} (cosine of the frozen expert's embeddings; threshold {threshold:.2f})",
    "retrieved": "similarity of the retrieved X-rays: {value:.2f} (cosine; threshold {threshold:.2f})",
    "findings": "the same findings were extracted from both reports",
    "ema": "similarity of one image and the other report: {value:.2f} (moving average of the model; threshold {threshold:.2f})",
}


@dataclass(frozen=True)
class Side:
    """One study of a pair: its report in pieces (shared words are marked), slices, and present findings."""

    study_id: str
    report: tuple[tuple[str, bool], ...]
    pictures: CTPictures | None
    problem: str
    findings: tuple[str, ...] | None


@dataclass(frozen=True)
class Pair:
    """Two studies, the evidence that they are interchangeable, how often they were corrected, and their labels."""

    title: str
    evidence: tuple[str, ...]
    counts: str
    labels: str
    wrong: bool
    sides: tuple[Side, Side]


@dataclass(frozen=True)
class Corrections:
    """The section: one row per epoch, totals in words, and pairs in full; `totals` is "" without a record of pairs."""

    epochs: tuple[tuple[str, ...], ...]
    headers: tuple[str, ...]
    labelled: bool
    totals: str
    rule: str
    pairs: tuple[Pair, ...]


def corrections(run: Run) -> Corrections | None:
    """Return the section on corrected false negatives, or None if stage 3 corrected none or was not run."""
    headers, epochs = _epochs(run)
    kept = run.corrected
    if kept is None and not epochs:
        return None
    labelled = any("Precision" in header for header in headers)
    pairs: tuple[Pair, ...] = ()
    if kept is not None and run.ct is not None:
        texts = _texts(run.ct)
        labels = label_table(run.ct) if run.ct.finding_names else None
        pairs = tuple(_pair(run, run.ct, texts, labels, row) for row in _choose(texts, labels, kept))
    return Corrections(epochs, headers, labelled, _totals(run, kept), RULE if pairs else "", pairs)


def _epochs(run: Run) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return headers and rows of the table by epoch, from the logs."""
    columns = {
        "train/suspected_pairs": "Suspected",
        "train/corrected_pairs": "Corrected",
        "train/suspected_share": "Suspected, of all pairs",
        "train/false_negative_precision": "Precision by labels",
        "train/false_negative_recall": "Recall by labels",
    }
    log = run.logs.get("align")
    if log is None or "train/suspected_pairs" not in log.columns or "epoch" not in log.columns:
        return (), ()
    held = {name: title for name, title in columns.items() if name in log.columns}
    means = log.groupby("epoch")[list(held)].max().dropna(how="all")
    places = sorted({round(place) for place in np.linspace(0, len(means) - 1, EPOCHS)}) if len(means) else []
    rows = []
    for epoch, row in means.iloc[places].iterrows():
        cells = [_cell(name, to_number(row[name])) for name in held]
        rows.append((f"{epoch}", *cells))
    return ("Epoch", *held.values()), tuple(rows)


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name.endswith("_pairs"):
        return f"{round(value):,}"
    return f"{100 * value:.1f} %" if name.endswith("_share") else f"{value:.3f}"


def _totals(run: Run, kept: pd.DataFrame | None) -> str:
    if kept is None:
        return "The pairs of this run were not recorded, because it is older than align/corrected.csv. To write it, run `ctx-distill align --force`."
    totals = mapping(run.metrics.get("alignment", {}).get("pairs"))
    counts = (
        f"{totals['suspected']:,} suspected and {totals['corrected']:,} corrected pairs of images over all batches. "
        if ({"suspected", "corrected"} <= totals.keys())
        else ""
    )
    return f"{counts}align/corrected.csv lists {len(kept):,} pairs: the strongest, the strongest that the labels contradict, and those closest to the threshold."


def _choose(texts: dict[str, str], labels: pd.DataFrame | None, kept: pd.DataFrame) -> list[pd.Series]:
    """Select the rows to show by `RULE`, deterministically."""
    frame = kept[kept["corrected_batches"] > 0]
    counts = {} if labels is None else (labels == 1).sum(axis=1).to_dict()
    pairs = list(zip(frame["study_id"], frame["other_study_id"], strict=True))
    frame = frame.assign(
        found=[-int(counts.get(one, 0)) for one, _ in pairs],
        same=[texts.get(one) == texts.get(other) for one, other in pairs],
        wrong=frame["labels_differ"] > 0,
    )
    order = ["strength", "found", "study_id", "other_study_id"]
    falling, rising = (frame.sort_values(order, ascending=[up, True, True, True]) for up in (False, True))
    used: set[str] = set()
    chosen: list[pd.Series] = []

    def take(rows: pd.DataFrame, count: int) -> None:
        for _, row in rows.iterrows():
            both = {row["study_id"], row["other_study_id"]}
            if count and not both & used and both <= texts.keys():
                used.update(both)
                chosen.append(row)
                count -= 1

    take(falling[~falling["wrong"] & ~falling["same"]], STRONG)
    if not chosen:
        take(falling[~falling["wrong"]], STRONG)
    take(rising[~rising["wrong"] & ~rising["same"] & (rising["strength"] < rising["strength"].max())], BORDERLINE)
    take(falling[falling["wrong"]], WRONG)
    return chosen


def _texts(ct: Manifest) -> dict[str, str]:
    """Return the reports of the training studies by study id."""
    train = ct.split("train")
    return {str(train.frame.at[row, "study_id"]): train.report(int(row)) for row in reversed(train.frame.index)}


def _pair(run: Run, ct: Manifest, texts: dict[str, str], labels: pd.DataFrame | None, row: pd.Series) -> Pair:
    thresholds = mapping(run.metrics.get("alignment", {}).get("thresholds"))
    evidence = []
    for kind in str(row["evidence"]).split("+"):
        value, threshold = to_number(row.get(kind)), to_number(thresholds.get(kind))
        if kind in _EVIDENCE and value is not None and (threshold is not None or kind == "findings"):
            evidence.append(_EVIDENCE[kind].format(value=value, threshold=threshold))
    ids = (str(row["study_id"]), str(row["other_study_id"]))
    sides = [_side(ct, labels, texts, one, other) for one, other in (ids, ids[::-1])]
    differ, known = int(row["labels_differ"]), int(row["labels_known"])
    verdict = (
        "No finding is labelled in both studies."
        if not known
        else (
            f"The labels agree on all {known} findings that are labelled in both."
            if not differ
            else f"The labels differ on {differ} of {known} findings that are labelled in both: the correction was wrong."
        )
    )
    first, last = int(row["first_epoch"]), int(row["last_epoch"])
    when = f"in epoch {first}" if first == last else f"from epoch {first} to {last}"
    counts = f"Suspected in {_times(int(row['suspected_batches']))} {when}, corrected in {_times(int(row['corrected_batches']))}."
    return Pair(f"{ids[0]} and {ids[1]}", tuple(evidence), counts, verdict, differ > 0, (sides[0], sides[1]))


def _times(count: int) -> str:
    return "1 batch" if count == 1 else f"{count:,} batches"


def _side(ct: Manifest, labels: pd.DataFrame | None, texts: dict[str, str], study: str, other: str) -> Side:
    pictures, problem = read_ct(ct, int(ct.frame.index[ct.frame["study_id"] == study][0]))
    findings = None
    if labels is not None and study in labels.index:
        findings = present(labels, study)
    return Side(study, shared_runs(texts[study], texts[other]), pictures, problem, findings)


def present(labels: pd.DataFrame, study: str) -> tuple[str, ...]:
    """Return the findings whose label is 1."""
    names: Sequence[str] = [str(name) for name in labels.columns if labels.at[study, name] == 1]
    return tuple(names)
