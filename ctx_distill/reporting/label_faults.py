"""Report labels that contradict the reports, as faults of `ctx-distill check`."""

from __future__ import annotations

from collections import defaultdict

from ctx_distill.data.manifests.manifest import Manifest
from ctx_distill.data.quality.faults import Fault
from ctx_distill.reporting.label_text_section import compare_labels


def label_faults(manifest: Manifest) -> dict[str, Fault]:
    """Return a warning per image id, with the record (from 1) and the findings whose label (1 or 0) the report contradicts."""
    if not manifest.finding_names:
        return {}
    rows = [int(row) for row in manifest.frame.index]
    images = [str(image) for image in manifest.frame["image_id"]]
    told: dict[str, list[str]] = defaultdict(list)
    places: dict[str, int] = {}
    for found in compare_labels(manifest).contradictions:
        what = "asserts it" if found.text else "denies it"
        told[images[found.place]].append(f"{found.finding} labelled {found.label}, the report {what}")
        places[images[found.place]] = found.place
    return {
        image: Fault("warning", "label_contradicts_text", f"record {rows[places[image]] + 1}: {'; '.join(texts)}")
        for image, texts in told.items()
    }
