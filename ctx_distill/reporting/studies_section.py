"""The section on studies, selected by rule, with slices, findings, the retrieved X-ray and the generated report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ctx_distill.reporting.pictures import CTPictures, Picture, ct_pictures, xray_picture
from ctx_distill.runs.run_reader import Run

if TYPE_CHECKING:
    from ctx_distill.data.manifests.manifest import Manifest

ABNORMAL, NORMAL = 4, 2
_TRUTH = {1.0: "present", 0.0: "absent", -1.0: "uncertain"}


@dataclass(frozen=True)
class FindingScore:
    """A probability, and the median of the finding's probabilities over all scored studies."""

    value: float
    median: float


@dataclass(frozen=True)
class FindingRow:
    """A finding of a study: the label in words, and one score per model (None without a score)."""

    name: str
    truth: str
    scores: tuple[FindingScore | None, ...]


@dataclass(frozen=True)
class RetrievedXray:
    """The X-ray retrieved for a study, with shared findings and findings of only one of them (None without labels)."""

    image_id: str
    similarity: float
    report: str
    picture: Picture | None
    problem: str
    shared: tuple[str, ...] | None = None
    only_ct: tuple[str, ...] = ()
    only_xray: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShownStudy:
    """One study of the page; missing parts are None or empty."""

    study_id: str
    patient_id: str
    chosen: str
    findings_text: str
    impression: str
    pictures: CTPictures | None
    problem: str
    findings: tuple[FindingRow, ...]
    neighbour: RetrievedXray | None
    reference: tuple[tuple[str, bool], ...]
    generated: tuple[tuple[str, bool], ...]


def label_table(manifest: Manifest) -> pd.DataFrame:
    """Return labels by study, one column per finding: the maximum over the study's images, with known before uncertain."""
    frame = pd.DataFrame(
        manifest.labels().astype(float), columns=list(manifest.finding_names), index=manifest.frame["study_id"]
    )
    known = frame.where(frame >= 0).groupby(level=0).max()
    return known.fillna(frame.groupby(level=0).max())


def choose_studies(run: Run) -> list[tuple[str, str]]:
    """Select studies deterministically, and return their ids with the reason for each.

    With labels and scores, abnormal and normal test studies are each ranked by the fit of scores to labels, and selected
    at even intervals from best to worst. Otherwise they are selected at even intervals from the sorted ids.
    """
    if run.ct is None:
        return []
    frame = run.ct.frame
    split = next((name for name in ("test", "val", "train") if (frame["split"] == name).any()), "test")
    ids = sorted(set(frame.loc[frame["split"] == split, "study_id"].astype(str)))
    kind, scores = ("zero-shot", run.zero_shot) if run.zero_shot is not None else ("classifier", run.classifier)
    if scores is not None and run.ct.finding_names:
        fits = study_fits(label_table(run.ct), scores.loc[scores.index.isin(ids)])
        abnormal = [(study, "abnormal") for study, (fit, sick) in fits.items() if sick]
        normal = [(study, "normal") for study, (fit, sick) in fits.items() if not sick]
        sick_count = max(ABNORMAL, ABNORMAL + NORMAL - len(normal))
        groups = [(abnormal, sick_count), (normal, max(NORMAL, ABNORMAL + NORMAL - len(abnormal)))]
        chosen = []
        for group, count in groups:
            for place in _evenly(len(group), count):
                study, word = group[place]
                extreme = {0: ", the best", len(group) - 1: ", the worst"}.get(place, "") if len(group) > 1 else ""
                rank = f"{place + 1} of {len(group)}{extreme}"
                chosen.append((study, f"{word} {split} study; fit of {kind} scores to its labels: rank {rank}"))
        if chosen:
            return chosen
    return [
        (ids[i], f"selected at even intervals from the sorted {split} studies")
        for i in _evenly(len(ids), ABNORMAL + NORMAL)
    ]


def _evenly(length: int, count: int) -> list[int]:
    """Return at most `count` distinct, evenly spaced positions of `length`, including the first and the last."""
    if length <= count:
        return list(range(length))
    return sorted({int(place) for place in np.linspace(0, length - 1, count).round()})


def study_fits(labels: pd.DataFrame, scores: pd.DataFrame) -> dict[str, tuple[float, bool]]:
    """Return, best first, the fit of each study's scores to its labels, and whether the study has a finding.

    Scores are converted to ranks in [0, 1] over the studies, per finding. The fit is the mean rank of the study's present
    findings minus that of its absent ones (for a normal study, minus the mean rank of all). Ties are broken by id.
    """
    names = [name for name in labels.columns if name in scores.columns]
    both = [study for study in scores.index if study in labels.index]
    if not names or not both:
        return {}
    ranks = scores.loc[both, names].rank(pct=True)
    truth = labels.loc[both, names]
    found: dict[str, tuple[float, bool]] = {}
    for study in both:
        row = ranks.loc[study].to_numpy(dtype=float)
        present = (truth.loc[study] == 1).to_numpy() & np.isfinite(row)
        absent = (truth.loc[study] == 0).to_numpy() & np.isfinite(row)
        if not present.any() and not absent.any():
            continue
        up = float(row[present].mean()) if present.any() else 0.0
        down = float(row[absent].mean()) if absent.any() else 0.0
        found[str(study)] = (up - down, bool((truth.loc[study] == 1).any()))
    return dict(sorted(found.items(), key=lambda item: (-item[1][0], item[0])))


def studies(run: Run) -> list[ShownStudy]:
    """Return the selected studies with all their results."""
    chosen = choose_studies(run)
    if run.ct is None or not chosen:
        return []
    labels = label_table(run.ct) if run.ct.finding_names else None
    xray_labels = label_table(run.xray) if run.xray is not None and run.xray.finding_names else None
    return [_study(run, run.ct, labels, xray_labels, study, why) for study, why in chosen]


def _study(
    run: Run, ct: Manifest, labels: pd.DataFrame | None, xray_labels: pd.DataFrame | None, study: str, why: str
) -> ShownStudy:
    rows = ct.frame.index[ct.frame["study_id"] == study]
    row = int(rows[0])
    pictures, problem = read_ct(ct, row)
    reference, generated = _reports(run, study)
    return ShownStudy(
        study_id=study,
        patient_id=str(ct.frame.at[row, "patient_id"]),
        chosen=why,
        findings_text=str(ct.frame.at[row, "findings"]),
        impression=str(ct.frame.at[row, "impression"]),
        pictures=pictures,
        problem=problem,
        findings=_findings(run, labels, study),
        neighbour=_neighbour(run, labels, xray_labels, study),
        reference=reference,
        generated=generated,
    )


def read_ct(ct: Manifest, row: int) -> tuple[CTPictures | None, str]:
    """Return the slices of a CT, or None and the reason."""

    try:
        return ct_pictures(ct.scan_file(row).read()), ""
    except (ValueError, OSError) as error:
        return None, f"The CT could not be shown: {error}"


def _findings(run: Run, labels: pd.DataFrame | None, study: str) -> tuple[FindingRow, ...]:
    """Return label and scores by finding: present ones first, then by descending first score."""
    tables = [table for table in (run.zero_shot, run.classifier) if table is not None]
    names = list(labels.columns) if labels is not None else []
    names += [name for table in tables for name in table.columns if name not in names]
    rows = []
    for name in dict.fromkeys(names):
        truth = "no label"
        if labels is not None and name in labels.columns and study in labels.index:
            truth = _TRUTH.get(float(labels[name][study]), "blank")
        scores = tuple(_score(table, study, name) for table in tables)
        rows.append(FindingRow(str(name), truth, scores))

    def order(finding: FindingRow) -> tuple[bool, float, str]:
        first = finding.scores[0] if finding.scores else None
        return finding.truth != "present", -(first.value if first else 0.0), finding.name

    return tuple(sorted(rows, key=order))


def _score(table: pd.DataFrame, study: str, name: str) -> FindingScore | None:
    if name not in table.columns or study not in table.index:
        return None
    value, median = float(table[name][study]), float(table[name].median())
    return FindingScore(value, median) if np.isfinite(value) else None


def _neighbour(
    run: Run, labels: pd.DataFrame | None, xray_labels: pd.DataFrame | None, study: str
) -> RetrievedXray | None:
    """Return the first retrieved X-ray of a study."""
    if run.retrieval is None or run.xray is None:
        return None
    found = run.retrieval[run.retrieval["study_id"] == study].sort_values("rank", kind="stable")
    if found.empty:
        return None
    image_id, similarity = str(found.iloc[0]["xray_image_id"]), float(found.iloc[0]["similarity"])
    rows = run.xray.frame.index[run.xray.frame["image_id"] == image_id]
    if not len(rows):
        return RetrievedXray(image_id, similarity, "", None, "This X-ray is no longer in the manifest.")
    row = int(rows[0])
    picture, problem = None, ""
    try:
        picture = xray_picture(run.xray.image_file(row), run.xray.inverted(row))
    except (ValueError, OSError) as error:
        problem = f"The X-ray could not be shown: {error}"
    neighbour = RetrievedXray(image_id, similarity, run.xray.report(row), picture, problem)
    other = str(run.xray.frame.at[row, "study_id"])
    if labels is None or xray_labels is None or study not in labels.index or other not in xray_labels.index:
        return neighbour
    common = [name for name in labels.columns if name in xray_labels.columns]
    if not common:
        return neighbour
    ours = [name for name in common if labels.at[study, name] == 1]
    theirs = [name for name in common if xray_labels.at[other, name] == 1]
    return RetrievedXray(
        image_id,
        similarity,
        neighbour.report,
        picture,
        problem,
        tuple(name for name in ours if name in theirs),
        tuple(name for name in ours if name not in theirs),
        tuple(name for name in theirs if name not in ours),
    )


def _reports(run: Run, study: str) -> tuple[tuple[tuple[str, bool], ...], tuple[tuple[str, bool], ...]]:
    """Return reference and generated report as pieces of text, each with whether both contain it; empty if missing."""
    if run.reports is None:
        return (), ()
    found = run.reports[run.reports["study_id"] == study]
    if found.empty:
        return (), ()
    reference, generated = str(found.iloc[0]["reference"]), str(found.iloc[0]["generated"])
    return shared_runs(reference, generated), shared_runs(generated, reference)


def shared_runs(words: str, other: str, length: int = 3) -> tuple[tuple[str, bool], ...]:
    """Split a text into sequences of `length` or more words that also occur in the other text (True), and the rest (False).

    The joined pieces are the text with normalised white space.
    """
    pieces = words.split()
    plain = [_plain(piece) for piece in pieces]
    known = set(_runs([_plain(piece) for piece in other.split()], length))
    marked = [False] * len(pieces)
    for start, run in enumerate(_runs(plain, length)):
        if run in known:
            marked[start : start + length] = [True] * length
    joined: list[tuple[str, bool]] = []
    for piece, mark in zip(pieces, marked, strict=True):
        if joined and joined[-1][1] == mark:
            joined[-1] = (f"{joined[-1][0]} {piece}", mark)
        elif joined:
            # The space belongs to the unmarked piece, so that no mark ends with a space.
            if mark:
                joined[-1] = (f"{joined[-1][0]} ", False)
            joined.append((piece if mark else f" {piece}", mark))
        else:
            joined.append((piece, mark))
    return tuple(joined)


def _plain(word: str) -> str:
    return re.sub(r"\W+", "", word).lower()


def _runs(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
