"""`ctx-distill predict`: many scans, one after the other, in a folder of results that goes on where it stopped."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ctx_distill.errors import InputError
from ctx_distill.files import hash_json, write_bytes, write_json, write_text
from ctx_distill.inference.model import CTModel
from ctx_distill.inference.parts import open_parts
from ctx_distill.inference.scans import Scan, find_scans, shown

PARTS = "parts"
MOST_PROBABLE = 3


def predict_scans(
    checkpoint: Path,
    given: Path,
    out: Path,
    saliency: Sequence[str] | None = None,
    report: bool = False,
    device: str = "cpu",
    vocabulary: str | None = None,
) -> tuple[str, int]:
    """Predict every scan and write what was found.

    OUT holds `probabilities.csv` (a row a scan: name, study, path, status `read` or `unreadable`, reason, whose the
    probabilities are, and one a finding), `embeddings.safetensors` (`embeddings` (N, D) float32, in the order of the
    table's `read` rows), `reports.csv`, `saliency/<scan>/<finding>.nii.gz`, and a part a scan that makes it go on.

    Args:
        checkpoint: run folder or artefact.
        given: a scan, a folder, or a manifest.
        out: folder to write.
        saliency: findings to make maps of; empty: of each scan the three most probable; None: no maps.
        report: write draft reports.
        device: to compute on.
        vocabulary: as `ctx_distill.load`.

    Returns:
        What to print, and the number of scans that could not be read.

    Raises:
        InputError: no model, no scans, or two names that make one file name.
    """
    scans = find_scans(given)
    twice = [slug for slug, n in Counter(scan.slug for scan in scans).items() if n > 1]
    if twice:
        raise InputError(f"{given}: several scans would be written as {twice[0]!r}. Rename them, or give a manifest.")
    model = CTModel(open_parts(checkpoint, vocabulary)).to(device)
    if report and not model.writes_reports:
        raise InputError(f"{checkpoint}: --report, but no report decoder is there. Run the report stage.")
    asked = hash_json([model.fingerprint, saliency, report, vocabulary])
    records = []
    for scan in shown(scans):
        records.append(_one(model, scan, out, asked, saliency, report))
    return _write(out, scans, records, model, report)


def _one(
    model: CTModel, scan: Scan, out: Path, asked: str, saliency: Sequence[str] | None, report: bool
) -> dict[str, Any]:
    part = out / PARTS / f"{scan.slug}.json"
    try:
        key = hash_json([asked, scan.name, scan.study, str(scan.file.path), scan.file.stamp()])
    except InputError as error:
        return {"reason": str(error)}
    standing = _standing(part, key)
    if standing is not None:
        return standing
    try:
        volume = scan.file.read()
    except InputError as error:  # not kept: it is tried again next time
        return {"reason": str(error)}
    found = model.predict_volume(volume, saliency=model.saliency_names(saliency or False), report=report)
    if saliency is not None and not saliency:
        first = sorted(found.probabilities, key=lambda name: -found.probabilities[name])[:MOST_PROBABLE]
        maps = model.predict_volume(volume, saliency=first).saliency
    else:
        maps = found.saliency
    for name, one in maps.items():
        one.write(out / "saliency" / scan.slug / f"{name.replace(' ', '_').replace('/', '_')}.nii.gz")
    record = {
        "key": key,
        "asked": found.asked,
        "probabilities": found.probabilities,
        "embedding": [float(x) for x in found.embedding],
        "report": found.report,
        "saliency": list(maps),
    }
    write_json(part, record)
    return record


def _standing(part: Path, key: str) -> dict[str, Any] | None:
    try:
        record = json.loads(part.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return dict(record) if record.get("key") == key else None


def _write(
    out: Path, scans: list[Scan], records: list[dict[str, Any]], model: CTModel, report: bool
) -> tuple[str, int]:
    pairs = list(zip(scans, records, strict=True))
    read = [(scan, record) for scan, record in pairs if "reason" not in record]
    header = ["scan", "study_id", "path", "status", "reason", "asked", *model.findings]
    rows = []
    for scan, record in pairs:
        lost = "reason" in record
        start = [scan.name, scan.study, str(scan.file.url or scan.file.path), "unreadable" if lost else "read"]
        values = [""] * len(model.findings)
        if not lost:
            values = [f"{record['probabilities'][name]:.6f}" for name in model.findings]
        rows.append([*start, record.get("reason", ""), record.get("asked", ""), *values])
    write_text(out / "probabilities.csv", _table(header, rows))
    embeddings = np.array([record["embedding"] for _, record in read], dtype=np.float32)
    names = json.dumps([scan.name for scan, _ in read])
    write_bytes(out / "embeddings.safetensors", save({"embeddings": embeddings}, metadata={"scans": names}))
    if report:
        write_text(out / "reports.csv", _table(["scan", "report"], [[s.name, r["report"]] for s, r in read]))
    failed = [(scan, record["reason"]) for scan, record in pairs if "reason" in record]
    told = [
        f"{len(read)} scans read, {len(failed)} unreadable; {model.notice}",
        f"results: {out / 'probabilities.csv'}",
    ]
    told += [f"unreadable: {scan.name}: {reason}" for scan, reason in failed]
    return "\n".join(told), len(failed)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
