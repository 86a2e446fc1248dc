"""Labels of the test studies that their reports contradict: the scores follow the labels, a reader need not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctx_distill.reporting.failures_section import LISTED, Failure
from ctx_distill.runs.run_reader import Run
from ctx_distill.text.contradictions import Comparison, compare
from ctx_distill.text.extractor import extract, vocabulary_for

if TYPE_CHECKING:
    from ctx_distill.data.manifests.manifest import Manifest

MOST_STUDIES = 5000
"""Of more test studies the page would be long in the making; `ctx-distill check` lists them all."""


def compare_labels(manifest: Manifest) -> Comparison:
    """The labels of all rows of a manifest against their reports; `place` counts its rows.

    A finding is read by the shipped vocabulary that knows its name, else by its name alone.
    """
    names = list(manifest.finding_names)
    vocabulary = vocabulary_for(names)
    read = [extract(manifest.report(int(row)), vocabulary) for row in manifest.frame.index]
    labels = {name: [float(v) for v in column] for name, column in zip(names, manifest.labels().T, strict=True)}
    return compare(labels, read)


def contradicted(run: Run) -> list[Failure]:
    """One entry that lists them; [] where there are none, no labels, or too many studies to read here."""
    if run.ct is None or not run.ct.finding_names:
        return []
    test = run.ct.split("test")
    test = test.where(~test.frame["study_id"].duplicated().to_numpy())
    if not 0 < len(test) <= MOST_STUDIES:
        return []
    rows, found = list(test.frame.index), compare_labels(test)
    if not found.contradictions:
        return []
    told = [
        f"{test.frame.at[rows[one.place], 'study_id']!s}: {one.finding} labelled {'present' if one.label else 'absent'}, the "
        f"report {'asserts' if one.text else 'denies'} it"
        for one in found.contradictions
    ]
    what = (
        f"{len(told):,} of {found.compared:,} labels of test studies contradict what the extractor reads in their reports; "
        "scores follow the labels."
    )
    return [Failure("data", "CT data", what, tuple(told[:LISTED]), max(0, len(told) - LISTED))]
