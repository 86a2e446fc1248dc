"""Paired differences of runs, with the same bootstrap draws of patients, from the runs' results per study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from ctx_distill.errors import InputError
from ctx_distill.metrics.bootstrap import Interval, interval, resample_counts
from ctx_distill.metrics.classification import macro_auroc_replicates, macro_average_precision_replicates
from ctx_distill.metrics.generation import generation_report, rouge_l
from ctx_distill.metrics.operating import calibration_scores, operating_scores
from ctx_distill.metrics.retrieval import common_labels, findings_jaccard
from ctx_distill.reporting.studies_section import label_table
from ctx_distill.run_files import CONFIG_FILE, RETRIEVAL
from ctx_distill.runs.run_reader import Run, mapping, to_number
from ctx_distill.text.extractor import Vocabulary, load_vocabulary, vocabulary_for

Floats = NDArray[np.float64]
REPLICATES, SEED = 1000, 0
TOLERANCE = 2e-3
"""Maximum difference between a metric recomputed from a file (six decimals) and the run's recorded value."""
OTHER_STUDIES = "other studies, labels or findings"
NO_FILE = "not recorded study by study"


@dataclass(frozen=True)
class Draws:
    """A metric of a run with its bootstrap replicates, (R,)."""

    value: float
    replicates: Floats


@dataclass(frozen=True)
class Source:
    """The metrics that can be recomputed from one file.

    Attributes:
        identity: Equal for two runs with the same studies, labels and findings; only then are draws paired.
        figures: Functions by dotted key, including `<stage>.per_finding.<finding>`.
    """

    identity: object
    figures: dict[str, Callable[[], Draws | None]] = field(default_factory=dict)


def sources(run: Run) -> list[Source]:
    """Return the files of a run from which metrics can be recomputed; missing files are skipped."""
    candidates = [_predictions(run, "zero_shot", run.zero_shot), _predictions(run, "classifier", run.classifier)]
    candidates += [_reports(run), _retrieval(run), *_ranks(run)]
    return [source for source in candidates if source is not None]


def difference(key: str, ours: list[Source], first: list[Source], run: Run, base: Run) -> Interval | str:
    """Return a metric of `run` minus that of `base`, with its paired 95 % interval over patients, or why there is none."""
    one, other = (next((s for s in held if key in s.figures), None) for held in (ours, first))
    if one is None or other is None:
        return NO_FILE
    if one.identity != other.identity:
        return OTHER_STUDIES
    mine, theirs = one.figures[key](), other.figures[key]()
    if mine is None or theirs is None:
        return "not defined"
    for of, drawn in ((run, mine), (base, theirs)):
        recorded = of.metric(key)
        if recorded is None or recorded.value is None or abs(recorded.value - drawn.value) > TOLERANCE:
            return "the file does not match metrics.json"
    return interval(mine.value - theirs.value, mine.replicates - theirs.replicates)


def _mean(values: Floats, patients: list[str]) -> Draws | None:
    if not len(values):
        return None
    counts = resample_counts(patients, REPLICATES, SEED)
    return Draws(float(values.mean()), counts @ values / counts.sum(1))


def _patients(run: Run, studies: list[str]) -> list[str]:
    assert run.ct is not None
    held = run.ct.frame.drop_duplicates("study_id").set_index("study_id")["patient_id"].astype(str)
    return [str(held[study]) for study in studies]


def _predictions(run: Run, stage: str, table: pd.DataFrame | None) -> Source | None:
    """Return AUROC, average precision, F1 and calibration of findings."""
    if run.ct is None or table is None or not run.ct.finding_names:
        return None
    labels = label_table(run.ct)
    studies = sorted(str(study) for study in table.index if study in labels.index)
    names = [str(name) for name in labels.columns if name in table.columns]
    if not studies or not names:
        return None
    y, s = (part.loc[studies, names].to_numpy(dtype=float) for part in (labels, table))
    s = np.where(np.isin(y, (0.0, 1.0)), s, np.nan_to_num(s))
    patients = _patients(run, studies)
    own = mapping(run.metrics.get(stage, {}).get("findings"))
    thresholds = [to_number(mapping(own.get(name)).get("threshold")) for name in names]

    def counts() -> NDArray[np.int32]:
        return resample_counts(patients, REPLICATES, SEED)

    def area(columns: list[int]) -> Draws | None:
        return _defined(*macro_auroc_replicates(y[:, columns], s[:, columns], counts()))

    def macro(values: Floats, replicates: Floats) -> Draws | None:
        kept = ~np.isnan(values)
        if not kept.any():
            return None
        with np.errstate(invalid="ignore"):
            present = ~np.isnan(replicates[:, kept])
            sums = np.where(present, replicates[:, kept], 0.0).sum(1)
            return Draws(float(values[kept].mean()), np.where(present.any(1), sums / present.sum(1), np.nan))

    figures: dict[str, Callable[[], Draws | None]] = {f"{stage}.macro_auroc": partial(area, list(range(len(names))))}
    for f, name in enumerate(names):
        figures[f"{stage}.per_finding.{name}"] = partial(area, [f])
    figures[f"{stage}.macro.average_precision"] = lambda: _defined(*macro_average_precision_replicates(y, s, counts()))
    figures[f"{stage}.macro.f1"] = lambda: macro(*operating_scores(y, s, thresholds, counts())["f1"])
    figures[f"{stage}.macro.ece"] = lambda: macro(*calibration_scores(y, s, counts())["ece"])
    return Source((studies, names, np.nan_to_num(y, nan=-9.0).tolist(), patients), figures)


def _defined(values: Floats, replicates: Floats) -> Draws | None:
    return None if np.isnan(values).all() else Draws(float(np.nanmean(values)), replicates)


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value


def _reports(run: Run) -> Source | None:
    """Return the scores of generated reports."""
    if run.ct is None or run.reports is None or run.reports.empty:
        return None
    table = run.reports.drop_duplicates("study_id").sort_values("study_id")
    known = set(run.ct.frame["study_id"].astype(str))
    table = table[table["study_id"].isin(known)]
    studies, references, generated = (table[name].tolist() for name in ("study_id", "reference", "generated"))
    patients = _patients(run, studies)
    drawn: dict[str, Draws] = {}

    def score(name: str) -> Draws | None:
        if not drawn:
            told, replicates = generation_report(references, generated, patients, _vocabulary(run), SEED, REPLICATES)
            drawn.update({key: Draws(float(told[key]["value"]), values) for key, values in replicates.items()})
        return drawn.get(name)

    def rouge() -> Draws | None:
        each = [rouge_l([true], [said]) for true, said in zip(references, generated, strict=True)]
        return _mean(np.array([_or_nan(value) for value in each]), patients)

    figures: dict[str, Callable[[], Draws | None]] = {"report.rouge_l": rouge, "report.bleu4": lambda: score("bleu4")}
    figures["report.findings_f1"] = lambda: score("findings_f1")
    return Source((studies, references, patients), figures)


def _vocabulary(run: Run) -> Vocabulary:
    """Return the vocabulary with which the run's reports were scored."""
    if run.ct is not None and run.ct.finding_names:
        return vocabulary_for(run.ct.finding_names)
    path = run.folder / "report" / CONFIG_FILE
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        name = mapping(mapping(mapping(told).get("model")).get("init_args")).get("vocabulary") or "ct-rate"
        return load_vocabulary(str(name))
    except (yaml.YAMLError, InputError, OSError):
        return load_vocabulary("ct-rate")


def _retrieval(run: Run) -> Source | None:
    """Return the agreement of findings between CTs and retrieved X-rays."""
    if run.ct is None or run.xray is None or run.retrieval is None or run.retrieval.empty:
        return None
    if not run.ct.finding_names or not run.xray.finding_names:
        return None
    frame = run.retrieval.assign(rank=pd.to_numeric(run.retrieval["rank"])).sort_values(["study_id", "rank"])
    labels = label_table(run.ct)
    place = {str(image): row for row, image in enumerate(run.xray.frame["image_id"])}
    frame = frame[frame["study_id"].isin(labels.index) & frame["xray_image_id"].isin(place)]
    studies = sorted(set(frame["study_id"].astype(str)))
    if not studies:
        return None
    names, asked, pool = common_labels(
        run.ct.finding_names, labels.loc[studies].to_numpy(), run.xray.finding_names, run.xray.labels()
    )
    if not names:
        return None
    near = {
        str(study): [place[str(image)] for image in rows["xray_image_id"]] for study, rows in frame.groupby("study_id")
    }
    shared = [findings_jaccard(asked[i : i + 1], pool[near[study]])[0] for i, study in enumerate(studies)]
    patients = _patients(run, studies)
    first = np.array([row[0] for row in shared])
    abnormal = (asked == 1).any(axis=1)
    sick = [patient for patient, keep in zip(patients, abnormal, strict=True) if keep]
    figures: dict[str, Callable[[], Draws | None]] = {
        "retrieval.jaccard_at_1": lambda: _mean(first, patients),
        "retrieval.jaccard_at_1_without_normals": lambda: _mean(first[abnormal], sick),
    }
    for k in (1, 5, 10):
        if min(len(row) for row in shared) >= min(k, len(pool)):
            hit = np.array([float((row[:k] == 1).any()) for row in shared])
            for spelling in ("same_set_recall", "recall"):
                figures[f"retrieval.{spelling}_at_{k}"] = partial(_mean, hit, patients)
    identity = (studies, names, np.nan_to_num(asked, nan=-9.0).tolist(), patients, run.xray.fingerprint)
    return Source(identity, figures)


def _ranks(run: Run) -> list[Source]:
    """Return the retrieval between reports and volumes, from `zero_shot/retrieval.csv`."""
    path = run.folder / "zero_shot" / RETRIEVAL
    if run.ct is None or not path.is_file():
        return []
    try:
        table = pd.read_csv(path, dtype={"study_id": "str", "direction": "str"})
        ranks = table.sort_values("study_id")[["direction", "study_id", "rank"]]
    except (ValueError, KeyError, OSError):
        return []
    known = set(run.ct.frame["study_id"].astype(str))
    found = []
    for direction, rows in ranks[ranks["study_id"].isin(known)].groupby("direction"):
        studies = rows["study_id"].tolist()
        patients, hit = _patients(run, studies), (rows["rank"].to_numpy(dtype=float) <= 5).astype(float)
        key = f"zero_shot.retrieval.{direction}.recall_at_5"
        texts = run.ct.frame.drop_duplicates("study_id").set_index("study_id").loc[studies, ["findings", "impression"]]
        found.append(Source((studies, patients, texts.to_numpy().tolist()), {key: partial(_mean, hit, patients)}))
    return found
