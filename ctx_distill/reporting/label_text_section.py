"""Labels of the test studies that contradict their reports; scores use the labels regardless."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctx_distill.reporting.failures_section import LISTED, Failure
from ctx_distill.runs.run_reader import Run
from ctx_distill.text.contradictions import Comparison, compare
from ctx_distill.text.extractor import extract, vocabulary_for

if TYPE_CHECKING:
    from ctx_distill.data.manifests.manifest import Manifest

MOST_STUDIES = 5000
"""Maximum number of test studies, because extraction takes time; `ctx-distill check` has no limit."""


def compare_labels(manifest: Manifest) -> Comparison:
    """Compare the labels of all rows of a manifest with their reports; `place` is the position of the row.

    Findings are extracted with the shipped vocabulary that contains their name, else by their name only.
    """
    names = list(manifest.finding_names)
    vocabulary = vocabulary_for(names)
    read = [extract(manifest.report(int(row)), vocabulary) for row in manifest.frame.index]
    labels = {name: [float(v) for v in column] for name, column in zip(names, manifest.labels().T, strict=True)}
    return compare(labels, read)


def contradicted(run: Run) -> list[Failure]:
    """Return one entry that lists the contradictions; [] without contradictions or labels, or with too many studies."""
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
        f"{len(told):,} of {found.compared:,} labels of test studies contradict the findings extracted from their reports; "
        "scores use the labels."
    )
    return [Failure("data", "CT data", what, tuple(told[:LISTED]), max(0, len(told) - LISTED))]
