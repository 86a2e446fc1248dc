"""`ctx-distill check` names the labels that a report contradicts, and leaves the others alone."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from ctx_distill.commands.main import main
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.reporting.label_faults import label_faults


def test_contradicted_labels_are_warnings_with_rows(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Image.fromarray(draw.integers(0, 255, (160, 160), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    path = tmp_path / "xray.csv"
    path.write_text(
        "study_id,patient_id,split,image_path,findings,impression,label:Cardiomegaly,label:Pleural Effusion\n"
        "s1,p1,train,a.png,The heart is enlarged. No effusion.,,0,1\n"
        "s2,p2,train,b.png,The heart is enlarged.,,1,1\n"
        "s3,p3,train,c.png,Possible effusion. Cardiomegaly.,,,0\n"
    )
    manifest = read_manifest(path)
    images = manifest.frame["image_id"].tolist()
    faults = label_faults(manifest)
    assert list(faults) == [images[0]]
    fault = faults[images[0]]
    assert (fault.severity, fault.code) == ("warning", "label_contradicts_text")
    assert fault.text == (
        "record 1: Cardiomegaly labelled 0, the report asserts it; Pleural Effusion labelled 1, the report denies it"
    )
    assert main(["check", str(path), "--out", str(tmp_path / "check"), "--workers", "1"]) == 0
    with (tmp_path / "check/check.csv").open() as file:
        told = ["label_contradicts_text" in row["warnings"] for row in csv.DictReader(file)]
    assert told == [True, False, False]
