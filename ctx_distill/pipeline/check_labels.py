"""Labels of a manifest that the reports contradict, as faults for `ctx-distill check`."""

from __future__ import annotations

from collections import defaultdict

from ctx_distill.data.faults import Fault
from ctx_distill.data.manifest import Manifest
from ctx_distill.text.contradictions import compare
from ctx_distill.text.findings import extract, vocabulary_for


def label_faults(manifest: Manifest) -> dict[str, Fault]:
    """Image id -> a warning that names the record (from 1) and the findings whose label (1 or 0) its report denies or asserts.

    A finding is read by the shipped vocabulary that knows its name, else by its name alone.
    """
    names = list(manifest.finding_names)
    if not names:
        return {}
    vocabulary = vocabulary_for(names)
    rows = [int(row) for row in manifest.frame.index]
    images = [str(image) for image in manifest.frame["image_id"]]
    read = [extract(manifest.report(row), vocabulary) for row in rows]
    labels = {name: [float(v) for v in column] for name, column in zip(names, manifest.labels().T, strict=True)}
    told: dict[str, list[str]] = defaultdict(list)
    places: dict[str, int] = {}
    for found in compare(labels, read).contradictions:
        what = "asserts it" if found.text else "denies it"
        told[images[found.place]].append(f"{found.finding} labelled {found.label}, the report {what}")
        places[images[found.place]] = found.place
    return {
        image: Fault("warning", "label_contradicts_text", f"record {rows[places[image]] + 1}: {'; '.join(texts)}")
        for image, texts in told.items()
    }
