"""Implement `ctx-distill merge`: combine manifests to train on several data sets."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from ctx_distill.data.io.remote import REMOTE
from ctx_distill.data.manifests.manifest import LABEL, NUMBERS, Manifest, read_manifest
from ctx_distill.errors import InputError
from ctx_distill.sources.rows import cell, counts, write_checked

_IDS = ("study_id", "patient_id", "image_id")
_TEXT = ("split", "image_path", "findings", "impression", "view", "language", "polarity")


def merge_manifests(paths: Sequence[Path], out: Path) -> str:
    """Write the rows of several manifests, in order, as one manifest, and return the counts as text.

    Each row gets a `source` (from its manifest, or else the manifest's file name), ids with the source as prefix
    (`ct-rate/train_1`), and the `root` that its path is relative to. Patients of the same source are identified by id. The
    manifest has the union of the label columns; missing labels are blank.

    Raises:
        InputError: fewer than two manifests, an invalid one, or a conflict (a duplicate image, a patient in two splits).
    """
    if len(paths) < 2:
        raise InputError(f"merge needs at least two manifests; got {len(paths)}")
    manifests = [read_manifest(path, check_images=False) for path in paths]
    findings = list(dict.fromkeys(name for manifest in manifests for name in manifest.finding_names))
    numbers = [name for name in NUMBERS if any(name in manifest.frame.columns for manifest in manifests)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_IDS, *_TEXT, "source", "root", *numbers, *(LABEL + name for name in findings)])
    for manifest in manifests:
        for row in manifest.frame.to_dict("records"):
            source = row.get("source") or manifest.path.stem
            labels = [row.get(LABEL + name) for name in findings]
            writer.writerow(
                [f"{source}/{row[name]}" for name in _IDS]
                + [row.get(name, "") for name in _TEXT]
                + [source, _root(manifest, str(row.get("root") or ""))]
                + [cell(row.get(name)) for name in numbers]
                + ["" if value is None or value != value else f"{value:g}" for value in labels]
            )
    return counts(out, "merged", write_checked(out, text.getvalue()))


def _root(manifest: Manifest, root: str) -> str:
    return root if REMOTE in root else str((manifest.path.parent / root).resolve())
