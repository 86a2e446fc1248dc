"""The section on errors: confusion counts at thresholds chosen on val, and the most confident errors with their reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ctx_distill.reporting.overlays import Shown, read_record, show_finding
from ctx_distill.reporting.studies_section import label_table
from ctx_distill.runs.run_reader import Run, mapping, to_number
from ctx_distill.text.assertion import ABSENT, PRESENT
from ctx_distill.text.extractor import vocabulary_for
from ctx_distill.text.report_text import split_sentences

if TYPE_CHECKING:
    from ctx_distill.data.manifests.manifest import Manifest

MODELS: tuple[tuple[str, str], ...] = (("zero_shot", "Zero-shot"), ("classifier", "Classifier"))
SHOWN = 3
"""Number of false positives, and of false negatives, per model."""
Kind = Literal["false positive", "false negative"]


@dataclass(frozen=True)
class Confusion:
    """Confusion counts of one finding at its threshold; a probability at or above it is a positive prediction."""

    finding: str
    threshold: float
    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def sensitivity(self) -> float | None:
        """TP / (TP + FN); None without a study that has the finding."""
        return self.tp / (self.tp + self.fn) if self.tp + self.fn else None

    @property
    def specificity(self) -> float | None:
        """TN / (TN + FP); None without a study that lacks the finding."""
        return self.tn / (self.tn + self.fp) if self.tn + self.fp else None


@dataclass(frozen=True)
class Error:
    """A wrong prediction, with its relative distance from the threshold (`margin`), in [0, 1]."""

    model: str
    kind: Kind
    study_id: str
    patient_id: str
    row: int
    finding: str
    probability: float
    threshold: float
    margin: float


@dataclass(frozen=True)
class Case:
    """An error as the page shows it.

    Attributes:
        error: The error.
        shown: Its slices.
        sentences: Sentences of the report that mention the finding.
        reading: What the report asserts according to the extractor, and whether the label agrees.
        doubt: Whether the report contradicts the label.
    """

    error: Error
    shown: Shown
    sentences: tuple[str, ...]
    reading: str
    doubt: bool


@dataclass(frozen=True)
class ModelErrors:
    """The errors of one model: one row per finding, the findings without a threshold and why, and the errors shown."""

    key: str
    name: str
    rows: tuple[Confusion, ...]
    without: tuple[tuple[str, str], ...]
    cases: tuple[Case, ...]

    @property
    def has_maps(self) -> bool:
        """Whether any of its errors is shown with a saliency map."""
        return any(case.shown.method for case in self.cases)


def confusion(finding: str, truth: ArrayLike, probability: ArrayLike, threshold: float) -> Confusion:
    """Return confusion counts of labels (N,) and probabilities (N,), ignoring other labels than 1 and 0 and blanks."""
    labels, scores = np.asarray(truth, dtype=np.float64), np.asarray(probability, dtype=np.float64)
    known = np.isin(labels, (0.0, 1.0)) & np.isfinite(scores)
    has, predicted = labels[known] == 1, scores[known] >= threshold
    counts = (has & predicted, ~has & predicted, has & ~predicted, ~has & ~predicted)
    tp, fp, fn, tn = (int(each.sum()) for each in counts)
    return Confusion(finding, threshold, tp, fp, fn, tn)


def thresholds(run: Run, model: str) -> dict[str, tuple[float | None, str]]:
    """Return the threshold of each finding of a model, chosen on val, or None, with the reason."""
    findings = mapping(run.metrics.get(model, {}).get("findings"))
    return {
        name: (to_number(mapping(row).get("threshold")), str(mapping(row).get("threshold_reason") or "not recorded"))
        for name, row in findings.items()
    }


def find_errors(run: Run, model: str) -> tuple[list[Confusion], list[Error]]:
    """Return the confusion counts per finding, and all errors of a model over the scored studies, most confident first.

    The margin of an error is its distance from the threshold, relative to the maximum distance: (p - t) / (1 - t) for a
    false positive, (t - p) / t for a false negative. Ties are broken by study and finding.
    """
    table = getattr(run, model)
    if table is None or run.ct is None or not run.ct.finding_names:
        return [], []
    test = run.ct.split(str(run.metrics[model].get("split", "test")))
    labels = label_table(test)
    both = table.index.intersection(labels.index)
    first = test.frame.drop_duplicates("study_id").set_index("study_id")
    rows = pd.Series(test.frame.index, index=test.frame["study_id"])
    rows = rows[~rows.index.duplicated()]
    counted, errors = [], []
    for name, (threshold, _) in thresholds(run, model).items():
        if threshold is None or name not in labels.columns or name not in table.columns or not len(both):
            continue
        truth, scores = labels.loc[both, name].astype(float), table.loc[both, name].astype(float)
        counted.append(confusion(name, truth, scores, threshold))
        for study, has, p in zip(both, truth, scores, strict=True):
            if not np.isfinite(p) or has not in (0.0, 1.0) or (has == 1) == (p >= threshold):
                continue
            kind: Kind = "false negative" if has == 1 else "false positive"
            room = threshold if has == 1 else 1 - threshold
            margin = abs(p - threshold) / room if room > 0 else 0.0
            patient, row = str(first.at[study, "patient_id"]), int(rows[study])
            errors.append(Error(model, kind, str(study), patient, row, name, float(p), threshold, float(margin)))
    return counted, sorted(errors, key=lambda error: (-error.margin, error.study_id, error.finding))


def choose_errors(errors: Iterable[Error], kind: Kind, count: int = SHOWN) -> list[Error]:
    """Return the first `count` errors of a kind, each of a different finding and patient."""
    chosen: list[Error] = []
    for error in errors:
        new = all(error.finding != one.finding and error.patient_id != one.patient_id for one in chosen)
        if error.kind == kind and new and len(chosen) < count:
            chosen.append(error)
    return chosen


def shown_errors(run: Run, model: str) -> list[Error]:
    """Return the errors of a model that the page shows: false positives, then false negatives."""
    return _shown(find_errors(run, model)[1])


def _shown(errors: list[Error]) -> list[Error]:
    return choose_errors(errors, "false positive") + choose_errors(errors, "false negative")


def model_errors(run: Run) -> list[ModelErrors]:
    """Return the section's contents, without models that were not scored against labels."""
    record = read_record(run.folder)
    found = []
    for key, name in MODELS:
        if getattr(run, key) is None or run.ct is None or not run.ct.finding_names:
            continue
        rows, errors = find_errors(run, key)
        without = tuple((each, reason) for each, (value, reason) in thresholds(run, key).items() if value is None)
        cases = tuple(_case(run, run.ct, error, record) for error in _shown(errors))
        found.append(ModelErrors(key, name, tuple(rows), without, cases))
    return found


def _case(run: Run, ct: Manifest, error: Error, record: dict[tuple[str, str, str], dict[str, object]]) -> Case:
    try:
        scan = ct.scan_file(error.row).read()
        key = (error.model, error.study_id, error.finding)
        shown = show_finding(run.folder, record, key, scan, ("axial", "coronal"), region_of(error.finding, ct))
    except (ValueError, OSError) as problem:
        shown = Shown((), "", f"The CT could not be shown: {problem}")
    text = "\n".join(str(ct.frame.at[error.row, section]) for section in ("findings", "impression"))
    sentences, assertion = speaks_of(text, error.finding, ct.finding_names)
    reading, doubt = _reading(assertion, error.kind)
    return Case(error, shown, sentences, reading, doubt)


def region_of(finding: str, ct: Manifest) -> str:
    """Return the vocabulary's region of a finding, or "" if unknown."""
    vocabulary = vocabulary_for(tuple(ct.finding_names))
    return vocabulary.findings[vocabulary.names.index(finding)].region or "" if finding in vocabulary.names else ""


def speaks_of(text: str, finding: str, names: Iterable[str]) -> tuple[tuple[str, ...], int | None]:
    """Return the sentences of a report that mention a finding, and what they assert.

    Args:
        text: The report.
        finding: One of `names`.
        names: The manifest's findings; all are extracted, so that a phrase counts for the finding it belongs to.

    Returns:
        The distinct sentences, and 1 present, 0 absent or -1 uncertain (present takes precedence over uncertain, uncertain
        over absent), or None if the report does not mention the finding.
    """
    vocabulary = vocabulary_for(tuple(names))
    number = vocabulary.names.index(finding)
    sentences: list[str] = []
    asserted: set[int] = set()
    for sentence in split_sentences(text):
        assertions = {assertion for place, assertion, _ in vocabulary.read(sentence) if place == number}
        if assertions:
            asserted |= assertions
            if sentence not in sentences:
                sentences.append(sentence)
    order = (PRESENT, -1, ABSENT)
    return tuple(sentences), next((value for value in order if value in asserted), None)


def _reading(assertion: int | None, kind: Kind) -> tuple[str, bool]:
    """Return what the report asserts, in words, and whether it contradicts the label."""
    verbs = {PRESENT: "asserts it", ABSENT: "denies it", None: "does not mention it"}
    report = f"The report {verbs.get(assertion, 'is uncertain about it')}"
    labelled = "present" if kind == "false negative" else "absent"
    doubt = (assertion == PRESENT) != (labelled == "present") and assertion in (PRESENT, ABSENT)
    if doubt:
        return f"{report}, but the label is {labelled}: check the label first.", True
    if assertion is None and labelled == "present":
        return f"{report}, but the label is {labelled}: the text does not support the label.", True
    return f"{report}, in agreement with the label." if assertion in (PRESENT, ABSENT) else f"{report}.", False
