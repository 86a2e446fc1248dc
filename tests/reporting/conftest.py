"""A believable run folder out of numpy: manifests, scans, films, logs, predictions and metrics."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image

FINDINGS = ("cardiomegaly", "consolidation", "pleural effusion", "lung nodule", "atelectasis", "emphysema")
WORDS = {
    "cardiomegaly": "The heart is enlarged.",
    "consolidation": "There is consolidation in the right lower lobe.",
    "pleural effusion": "A left pleural effusion is seen.",
    "lung nodule": "A nodule of 9 mm lies in the left upper lobe.",
    "atelectasis": "Linear atelectasis at the lung bases.",
    "emphysema": "Centrilobular emphysema in both upper lobes.",
}
STAGE_KEYS = {"index": "retrieval", "distill": "distillation", "align": "alignment"}


def chest(seed: int, size: tuple[int, int, int] = (56, 60, 80)) -> NDArray[np.int16]:
    """A chest (z up, y to posterior, x to the patient's left) of 5 mm voxels: body, lungs, heart on the left, spine."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij")
    hu = np.full(size, -1000.0)
    hu[(x / 0.9) ** 2 + (y / 0.8) ** 2 < 1] = -90
    hu[(x / 0.82) ** 2 + (y / 0.7) ** 2 < 1] = 45
    for side in (-1, 1):
        lung = ((x - side * 0.42) / 0.33) ** 2 + (y / 0.58) ** 2 + ((z - 0.15) / 0.8) ** 2 < 1
        hu[lung & (z > -0.55 + 0.1 * side)] = -860
    hu[((x - 0.16) / 0.34) ** 2 + ((y + 0.2) / 0.3) ** 2 + ((z + 0.2) / 0.35) ** 2 < 1] = 50
    hu[(x / 0.1) ** 2 + ((y - 0.5) / 0.13) ** 2 < 1] = 400
    vessels = (rng.random(size) > 0.985) & (hu == -860)
    hu[vessels] = -300
    return (hu + rng.normal(0, 15, size)).astype(np.int16)


def save_nifti(path: Path, hu: NDArray[np.int16], spacing: tuple[float, float, float]) -> None:
    """Write (z, y, x) of the contract's axes as NIfTI, whose own axes are x, y, z to Right, Anterior, Superior."""
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    affine[:3, 3] = [170, 140, -100]
    nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0), affine), path)


def report_of(row: NDArray[np.float64]) -> str:
    found = [WORDS[name] for name, value in zip(FINDINGS, row) if value == 1]
    return " ".join(found) or "The lungs are clear. No pleural effusion. The heart is of normal size."


def interval(value: float) -> dict[str, float]:
    return {"value": round(value, 4), "low": round(value - 0.06, 4), "high": round(min(1.0, value + 0.05), 4)}


def write_run(root: Path, labels: bool = True) -> Path:
    """Write data and a finished run below `root`; gives the run folder."""
    rng = np.random.default_rng(3)
    data, run = root / "data", root / "run"
    for folder in (data / "ct", data / "xray", run / "index", run / "classifier", run / "report"):
        folder.mkdir(parents=True)
    splits = ["train"] * 6 + ["val"] * 4 + ["test"] * 30
    truth = (rng.random((40, len(FINDINGS))) < 0.22).astype(float)
    ct = pd.DataFrame({"study_id": [f"ct{i:03d}" for i in range(40)], "split": splits})
    ct["patient_id"] = "p" + ct["study_id"].str[2:]
    ct["image_path"] = [f"ct/scan{i % 3}.nii.gz" for i in range(40)]
    ct["findings"] = [report_of(row) for row in truth]
    ct["impression"] = ["Normal chest." if not row.any() else "Findings as described." for row in truth]
    for number in range(3):
        save_nifti(data / "ct" / f"scan{number}.nii.gz", chest(number), (5.0, 5.0, 5.0))
    films = (rng.random((12, len(FINDINGS))) < 0.3).astype(float)
    xray = pd.DataFrame({"study_id": [f"cxr{i:02d}" for i in range(12)], "split": "train"})
    xray["patient_id"] = "q" + xray["study_id"].str[3:]
    xray["image_path"] = [f"xray/film{i % 2}.png" for i in range(12)]
    xray["findings"] = ["PA view. " + report_of(row) for row in films]
    xray["impression"] = ""
    for number in range(2):
        shadow = np.exp(chest(number + 7).astype(float).clip(-1000, 500).mean(axis=1) / 400)[::-1]
        grey = (255 * (shadow - shadow.min()) / np.ptp(shadow)).astype(np.uint8)
        Image.fromarray(grey).resize((320, 300)).save(data / "xray" / f"film{number}.png")
    if labels:
        for column, name in enumerate(FINDINGS):
            ct[f"label:{name}"] = truth[:, column].astype(int)
            xray[f"label:{name}"] = films[:, column].astype(int)
    ct.to_csv(data / "ct.csv", index=False)
    xray.to_csv(data / "xray.csv", index=False)

    test = truth[10:]
    tables = {}
    for path, gain in (("zero_shot_predictions.csv", 0.13), ("classifier/predictions.csv", 0.25)):
        scores = (0.45 + gain * test + rng.normal(0, 0.1, test.shape)).clip(0.01, 0.99)
        tables[path] = pd.DataFrame(scores, columns=list(FINDINGS))
        tables[path].insert(0, "study_id", ct["study_id"][10:].to_numpy())
        if labels or not path.startswith("classifier"):
            tables[path].to_csv(run / path, index=False)
    pairs = [(s, split, k, int(rng.integers(12))) for s, split in zip(ct["study_id"][6:], splits[6:]) for k in (1, 2)]
    retrieval = pd.DataFrame(
        [(s, split, k, f"cxr{j:02d}", f"cxr{j:02d}", round(0.9 - 0.05 * k, 3)) for s, split, k, j in pairs],
        columns=["study_id", "split", "rank", "xray_study_id", "xray_image_id", "similarity"],
    )
    retrieval.to_csv(run / "index" / "retrieval.csv", index=False)
    generated = np.abs(test - (rng.random(test.shape) < 0.15))
    reports = pd.DataFrame(
        {"study_id": ct["study_id"][10:], "reference": ct["findings"][10:], "generated": map(report_of, generated)}
    )
    reports.to_csv(run / "reports.csv", index=False)

    for stage in ("expert", "distill", "align", "classifier", "report"):
        if stage == "classifier" and not labels:
            shutil.rmtree(run / "classifier")
            continue
        (run / stage / "logs").mkdir(parents=True, exist_ok=True)
        rows = []
        for epoch in range(12):
            for step in range(3):
                loss = 0.3 + np.exp(-epoch / 4) + rng.normal(0, 0.05)
                rows.append({"epoch": epoch, "step": 3 * epoch + step, "train/loss": loss, "train/pair": loss / 2})
            val = {"val/loss": 0.42 + np.exp(-epoch / 4), "val/pair": 0.2, "val/recall_at_5": epoch / 20, "lr": 1e-4}
            rows.append({"epoch": epoch, "step": 3 * epoch + 2, **val})
        pd.DataFrame(rows).to_csv(run / stage / "logs" / "metrics.csv", index=False)

    metrics: dict[str, dict[str, object]] = {
        "expert": {"macro_auroc": interval(0.88) if labels else None},
        "retrieval": {
            "jaccard_at_1": interval(0.61) if labels else None,
            "jaccard_random": 0.17 if labels else None,
            "jaccard_at_1_without_normals": 0.48 if labels else None,
            "same_set_recall_at_1": 0.4 if labels else None,
            "left_out": {"not a frontal view": 2, "patient is in CT val or test": 1},
            "pool": 12,
        },
        "distillation": {"macro_auroc": 0.71 if labels else None},
        "alignment": {"recall_at_5": interval(0.34), "recall_at_5_random": 0.125},
        "zero_shot": {"macro_auroc": interval(0.78) if labels else None},
        "report": {"bleu4": interval(0.31), "findings_f1": interval(0.55), "rouge_l": 0.5},
    }
    if labels:
        for key, base in (("zero_shot", 0.74), ("classifier", 0.82)):
            held = {name: interval(base + 0.03 * i - 0.05) for i, name in enumerate(FINDINGS)}
            metrics.setdefault(key, {})["per_finding"] = {**held, "emphysema": None}
        metrics["classifier"]["macro_auroc"] = interval(0.86)
    (run / "metrics.json").write_text(json.dumps(metrics))
    info = {
        "version": "0.1.0",
        "created": "2026-01-05 10:00:00",
        "preset": "demo",
        "command": "make all DATA=data RUN=run",
        "ct": {"path": str(data / "ct.csv"), "fingerprint": "a1" * 32, "images": 40, "studies": 40,
               "splits": {"train": 6, "val": 4, "test": 30}},
        "xray": {"path": str(data / "xray.csv"), "fingerprint": "b2" * 32, "images": 12, "studies": 12,
                 "splits": {"train": 12}},
        "expert": {"name": "demo expert", "license": "Apache-2.0", "fingerprint": "c3" * 32},
        "volume_spec": {"spacing": [3.0, 3.0, 3.0], "shape": [96, 112, 112], "window": [-1000.0, 400.0]},
        "stages": {"expert": {"seconds": 81.2, "fingerprint": "d4" * 32}, "index": {"seconds": 6.0}},
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(info))
    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; not to be changed."""
    return write_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def make_run(finished: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a finished run of the test's own, to take parts away from."""

    def make(labels: bool = True) -> Path:
        if not labels:
            return write_run(tmp_path, labels=False)
        shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("index.html"))
        return tmp_path / "run"

    return make
