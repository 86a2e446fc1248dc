"""The cohort folder: its bytes, its resumption, its manifests and its refusals."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ctx_distill.phantom.cohort import REQUEST, write_cohort
from ctx_distill.phantom.items import plan_study
from ctx_distill.phantom.planted_findings import FINDINGS, NORMALS
from ctx_distill.types import InputError

CT, XRAY, SEED = 6, 9, 4


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "cohort"
    write_cohort(out, CT, XRAY, SEED, workers=1)
    return out


def test_same_seed_same_bytes_whatever_the_workers(cohort: Path, tmp_path: Path) -> None:
    write_cohort(tmp_path / "two", CT, XRAY, SEED, workers=2)
    assert digests(tmp_path / "two") == digests(cohort)
    assert len(digests(cohort)) == (CT + 1) + XRAY + 3  # one CT study has two reconstructions


def test_another_seed_gives_another_cohort(cohort: Path, tmp_path: Path) -> None:
    write_cohort(tmp_path / "other", 1, 1, SEED + 1, workers=1)
    mine, other = digests(cohort), digests(tmp_path / "other")
    assert mine["ct/CT000000.nii.gz"] != other["ct/CT000000.nii.gz"]
    assert mine["xray/XR000000.png"] != other["xray/XR000000.png"]


def test_a_stopped_run_is_finished_to_the_same_bytes(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    write_cohort(out, CT, XRAY, SEED, workers=1)
    whole = digests(out)
    for name in ("cohort.json", "ct.csv", "ct/CT000002.nii.gz", "xray/XR000001.png", "xray/XR000008.png"):
        (out / name).unlink()
    (out / "ct" / ".CT000002.nii.gz.99.part").write_bytes(b"half")
    kept = out / "xray" / "XR000000.png"
    stamp = kept.stat().st_mtime_ns
    write_cohort(out, CT, XRAY, SEED, workers=1)
    assert digests(out) == whole == digests(cohort)
    assert kept.stat().st_mtime_ns == stamp
    assert not list(out.rglob("*.tmp"))


def test_a_finished_cohort_is_left_alone(cohort: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in cohort.rglob("*")}
    write_cohort(cohort, CT, XRAY, SEED)
    assert {path: path.stat().st_mtime_ns for path in cohort.rglob("*")} == before


def test_refusals(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"seed 4, ct 6, xray 9, asked for was .*ct 7.*another"):
        write_cohort(cohort, CT + 1, XRAY, SEED)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / REQUEST).write_text(json.dumps({"generator": 1, "seed": 1, "ct": 2, "xray": 2}))
    with pytest.raises(InputError, match="asked for was"):
        write_cohort(unfinished, 3, 2, 1)
    (unfinished / REQUEST).write_text("{")
    with pytest.raises(InputError, match="not a cohort"):
        write_cohort(unfinished, 3, 2, 1)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "ct.csv").write_text("mine")
    with pytest.raises(InputError, match=r"ct\.csv"):
        write_cohort(foreign, 3, 2, 1)
    assert (foreign / "ct.csv").read_text() == "mine"
    with pytest.raises(InputError, match="is a file"):
        write_cohort(foreign / "ct.csv", 3, 2, 1)
    for bad in ({"ct": 0}, {"xray": -1}, {"seed": -1}, {"workers": 0}):
        with pytest.raises(InputError, match=next(iter(bad))):
            write_cohort(tmp_path / "bad", **{"ct": 1, "xray": 1, "seed": 1, "workers": 1, **bad})


def test_manifests(cohort: Path) -> None:
    tables = {name: pd.read_csv(cohort / f"{name}.csv", keep_default_na=False) for name in ("ct", "xray")}
    labels = [f"label:{name}" for name in FINDINGS]
    assert len(labels) >= 12
    for name, table in tables.items():
        assert [column for column in table if column.startswith("label:")] == labels
        assert table.image_id.is_unique
        assert set(np.unique(table[labels])) <= {0, 1}
        assert all((cohort / path).is_file() for path in table.image_path)
        assert (table.groupby("patient_id").split.nunique() == 1).all()
        assert set(table.language) == {"en"}
        assert ((table.findings != "") | (table.impression != "")).all()
        assert table.study_id.nunique() == {"ct": CT, "xray": XRAY}[name]
    assert set(tables["ct"].split) == {"train", "val", "test"}
    assert set(tables["xray"].view) == {"frontal"}
    assert set(tables["ct"].patient_id).isdisjoint(tables["xray"].patient_id)


def test_shares_over_many_studies() -> None:
    plans = {
        modality: [plan_study(2, modality, index) for index in range(400)]  # type: ignore[arg-type]
        for modality in ("ct", "xray")
    }
    for modality, studies in plans.items():
        normal = np.mean([not study.findings for study in studies])
        assert normal == pytest.approx(NORMALS / 20) == pytest.approx(0.3)
        for name in FINDINGS:
            share = np.mean([any(f.name == name for f in study.findings) for study in studies])
            assert 0.07 < share < 0.26, (modality, name)
        assert max(len(study.findings) for study in studies) <= 4
        for study in studies:
            assert len({f.name for f in study.findings}) == len(study.findings)
        of_patient: dict[str, set[str]] = {}
        for study in studies:
            of_patient.setdefault(study.patient_id, set()).add(study.split)
        assert all(len(splits) == 1 for splits in of_patient.values())
    share = {
        (modality, split): np.mean([study.split == split for study in studies])
        for modality, studies in plans.items()
        for split in ("train", "val", "test")
    }
    assert list(share.values()) == pytest.approx([0.6, 0.1, 0.3, 0.85, 0.05, 0.1], abs=0.02)
    assert len({study.patient_id for study in plans["xray"]}) == pytest.approx(0.95 * 400, abs=1)
    assert sum(len(study.image_ids) for study in plans["ct"]) == pytest.approx(1.03 * 400, abs=2)
