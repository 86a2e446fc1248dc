"""Select the saliency maps that the page shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ctx_distill.reporting.errors_section import MODELS, region_of, shown_errors
from ctx_distill.reporting.overlays import Shown, read_record, show_finding
from ctx_distill.reporting.studies_section import choose_studies, label_table
from ctx_distill.runs.run_reader import Run


@dataclass(frozen=True)
class Wanted:
    """A map to compute: model (`zero_shot` or `classifier`), study, manifest row and finding."""

    model: str
    study_id: str
    row: int
    finding: str


@dataclass(frozen=True)
class StudyMap:
    """The map of a study: name of the model, finding, probability, and why the finding was selected."""

    model: str
    finding: str
    probability: float
    why: str
    shown: Shown


def wanted_maps(run: Run) -> list[Wanted]:
    """Return the distinct maps of the studies and errors on the page, ordered by study."""
    found: list[Wanted] = []
    if run.ct is None:
        return []
    for study, _ in choose_studies(run):
        salient = _salient(run, study)
        if salient is not None:
            found.append(salient[0])
    for model, _ in MODELS:
        found += [Wanted(model, one.study_id, one.row, one.finding) for one in shown_errors(run, model)]
    return sorted(set(found), key=lambda one: (one.study_id, one.model, one.finding))


def study_maps(run: Run, studies: Sequence[str]) -> dict[str, StudyMap]:
    """Return slices through the peak of one map per study, for studies with a map."""
    record, names, found = read_record(run.folder), dict(MODELS), {}
    for study in studies:
        salient = _salient(run, study)
        if salient is None or run.ct is None:
            continue
        one, probability, why = salient
        key = (one.model, study, one.finding)
        if key not in record:
            continue
        region = region_of(one.finding, run.ct)
        try:
            scan = run.ct.scan_file(one.row).read()
            shown = show_finding(run.folder, record, key, scan, ("axial", "coronal", "sagittal"), region)
        except (ValueError, OSError):
            continue  # the study's slices report the problem
        found[study] = StudyMap(names[one.model], one.finding, probability, why, shown)
    return found


def _salient(run: Run, study: str) -> tuple[Wanted, float, str] | None:
    """Select the finding of a study's map: the most probable present finding, else the most probable one."""
    model = "classifier" if run.classifier is not None else "zero_shot"
    table = getattr(run, model)
    if run.ct is None or table is None or study not in table.index:
        return None
    scores = table.loc[study].dropna()
    if run.ct.finding_names:
        labels = label_table(run.ct)
        scores = scores[[name for name in scores.index if name in labels.columns]]
        present = [name for name in scores.index if study in labels.index and labels.at[study, name] == 1]
    else:
        present = []
    if scores.empty:
        return None
    held = scores[present] if present else scores
    why = "the most probable finding that is present" if present else "the most probable finding"
    row = int(run.ct.frame.index[run.ct.frame["study_id"] == study][0])
    finding = str(held.idxmax())
    return Wanted(model, study, row, finding), float(held.max()), why
