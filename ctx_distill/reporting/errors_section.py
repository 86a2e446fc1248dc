"""Where the models are wrong: confusion counts at thresholds chosen on val, and the most confident errors with their reports."""

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
"""False positives, and as many false negatives, a model."""
Kind = Literal["false positive", "false negative"]


@dataclass(frozen=True)
class Confusion:
    """Test studies of one finding at its threshold: `called` ones have a probability at or above it."""

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
        """TN / (TN + FP); None without a study that has it not."""
        return self.tn / (self.tn + self.fp) if self.tn + self.fp else None


@dataclass(frozen=True)
class Error:
    """A wrong answer: which, how far beyond the threshold, in [0, 1]."""

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
        error: which.
        shown: its slices.
        sentences: those of its report that speak of the finding.
        reading: what the extractor makes of the report, in words, and what that says of the label.
        doubt: whether the report contradicts the label.
    """

    error: Error
    shown: Shown
    sentences: tuple[str, ...]
    reading: str
    doubt: bool


@dataclass(frozen=True)
class ModelErrors:
    """One model's: a row a finding, the findings without a threshold and why, and the errors shown."""

    key: str
    name: str
    rows: tuple[Confusion, ...]
    without: tuple[tuple[str, str], ...]
    cases: tuple[Case, ...]

    @property
    def has_maps(self) -> bool:
        """Whether one of its errors is shown with a saliency map."""
        return any(case.shown.method for case in self.cases)


def confusion(finding: str, truth: ArrayLike, probability: ArrayLike, threshold: float) -> Confusion:
    """Count labels 1 and 0, (N,), against probabilities, (N,); other labels and blank probabilities are left out."""
    labels, scores = np.asarray(truth, dtype=np.float64), np.asarray(probability, dtype=np.float64)
    known = np.isin(labels, (0.0, 1.0)) & np.isfinite(scores)
    has, called = labels[known] == 1, scores[known] >= threshold
    counts = (has & called, ~has & called, has & ~called, ~has & ~called)
    tp, fp, fn, tn = (int(each.sum()) for each in counts)
    return Confusion(finding, threshold, tp, fp, fn, tn)


def thresholds(run: Run, model: str) -> dict[str, tuple[float | None, str]]:
    """Of each finding of a model: its threshold chosen on val, or None, and the reason."""
    found = mapping(run.metrics.get(model, {}).get("findings"))
    return {
        name: (to_number(mapping(own).get("threshold")), str(mapping(own).get("threshold_reason") or "not stated"))
        for name, own in found.items()
    }


def find_errors(run: Run, model: str) -> tuple[list[Confusion], list[Error]]:
    """Confusion counts a finding and every wrong answer of a model over the studies that were scored, the most confident first.

    An error's margin is how far its probability lies beyond the threshold, as a share of how far it could:
    (p - t) / (1 - t) of a false positive, (t - p) / t of a false negative. Ties go by study and finding.
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
    """The first `count` errors of a kind, each of a finding and a patient that no earlier one has."""
    chosen: list[Error] = []
    for error in errors:
        new = all(error.finding != one.finding and error.patient_id != one.patient_id for one in chosen)
        if error.kind == kind and new and len(chosen) < count:
            chosen.append(error)
    return chosen


def shown_errors(run: Run, model: str) -> list[Error]:
    """The errors of a model that the page shows: false positives, then false negatives."""
    return _shown(find_errors(run, model)[1])


def _shown(errors: list[Error]) -> list[Error]:
    return choose_errors(errors, "false positive") + choose_errors(errors, "false negative")


def model_errors(run: Run) -> list[ModelErrors]:
    """What the section shows; nothing for a model that was not scored against labels."""
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
    """The vocabulary's region of a finding; "" where none is known."""
    vocabulary = vocabulary_for(tuple(ct.finding_names))
    return vocabulary.findings[vocabulary.names.index(finding)].region or "" if finding in vocabulary.names else ""


def speaks_of(text: str, finding: str, names: Iterable[str]) -> tuple[tuple[str, ...], int | None]:
    """The sentences of a report that speak of a finding, and what they assert together.

    Args:
        text: the report.
        finding: one of `names`.
        names: the manifest's findings; all are looked for, so that a phrase counts for the one that it belongs to.

    Returns:
        The sentences, each once, and 1 present, 0 absent, -1 uncertain (present outranks uncertain, uncertain absent),
        None where the report does not speak of it.
    """
    vocabulary = vocabulary_for(tuple(names))
    number = vocabulary.names.index(finding)
    sentences: list[str] = []
    said: set[int] = set()
    for sentence in split_sentences(text):
        own = {assertion for place, assertion, _ in vocabulary.read(sentence) if place == number}
        if own:
            said |= own
            if sentence not in sentences:
                sentences.append(sentence)
    order = (PRESENT, -1, ABSENT)
    return tuple(sentences), next((value for value in order if value in said), None)


def _reading(assertion: int | None, kind: Kind) -> tuple[str, bool]:
    """The report in words, and whether it contradicts the label."""
    says = {PRESENT: "asserts it", ABSENT: "denies it", None: "does not speak of it"}.get(assertion, "is unsure of it")
    labelled = "present" if kind == "false negative" else "absent"
    doubt = (assertion == PRESENT) != (labelled == "present") and assertion in (PRESENT, ABSENT)
    if doubt:
        return f"The report {says}, the label says {labelled}: look at the label first.", True
    if assertion is None and labelled == "present":
        return f"The report {says}, the label says {labelled}: on what the label rests is not in the text.", True
    return f"The report {says}, as the label does." if assertion in (PRESENT, ABSENT) else f"The report {says}.", False
