"""`ctx-distill predict`: every scan in the table, read or not; it goes on where it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open

import ctx_distill
from ctx_distill.commands.main import main
from ctx_distill.inference.model import CTModel


@pytest.fixture
def folder(cohort: Path, tmp_path: Path) -> Path:
    """Two scans, one of them in a folder below, and a file that is cut off."""
    scans = sorted(cohort.glob("ct/*.nii.gz"))
    place = tmp_path / "scans"
    (place / "deeper").mkdir(parents=True)
    shutil.copy(scans[0], place / "a.nii.gz")
    shutil.copy(scans[1], place / "deeper" / "b.nii.gz")
    (place / "cut.nii.gz").write_bytes(scans[2].read_bytes()[:5000])
    (place / "notes.txt").write_text("no scan")
    return place


def test_a_folder(finished_run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["predict", str(finished_run), str(folder), "--out", str(out), "--report", "--saliency"]
    assert main(command) == 1
    told = capsys.readouterr().out
    assert "2 scans read, 1 unreadable" in told
    assert "cut.nii.gz" in told

    table = pd.read_csv(out / "probabilities.csv", keep_default_na=False).set_index("scan")
    assert table["status"].to_dict() == {"a.nii.gz": "read", "cut.nii.gz": "unreadable", "deeper/b.nii.gz": "read"}
    assert "truncated" in table.at["cut.nii.gz", "reason"]
    model = ctx_distill.load(finished_run)
    with safe_open(out / "embeddings.safetensors", framework="np") as handle:
        embeddings = handle.get_tensor("embeddings")
    for place, name in enumerate(["a.nii.gz", "deeper/b.nii.gz"]):
        one = model.predict(folder / name, report=True)
        said = table.loc[name, list(model.findings)].to_numpy(float)
        np.testing.assert_allclose(said, list(one.probabilities.values()), atol=1e-6)
        np.testing.assert_allclose(embeddings[place], one.embedding, atol=1e-6)
        maps = sorted((out / "saliency" / name.replace("/", "_")).iterdir())
        best = sorted(one.probabilities, key=lambda finding: -one.probabilities[finding])[:3]
        assert {path.name for path in maps} == {f"{finding.replace(' ', '_')}.nii.gz" for finding in best}
        assert nib.load(maps[0]).shape == nib.load(folder / name).shape
    assert len(pd.read_csv(out / "reports.csv")) == 2


def test_it_goes_on(
    finished_run: Path, folder: Path, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["predict", str(finished_run), str(folder), "--out", str(tmp_path / "out")]
    asked: list[str] = []
    real = CTModel.predict_volume

    def counted(self: CTModel, scan: object, **more: object) -> object:
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(str(scan.path))  # type: ignore[attr-defined]
        return real(self, scan, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(CTModel, "predict_volume", counted)
    assert main(command) == 130
    monkeypatch.setattr(
        CTModel, "predict_volume", lambda self, scan, **more: asked.append(scan.path) or real(self, scan, **more)
    )
    shutil.copy(sorted(cohort.glob("ct/*.nii.gz"))[2], folder / "cut.nii.gz")  # mended meanwhile
    assert main(command) == 0
    assert [Path(path).name for path in asked] == ["a.nii.gz", "cut.nii.gz", "b.nii.gz"]
    assert main(command) == 0
    assert len(asked) == 3


def test_a_manifest_with_a_scan_that_is_gone(finished_run: Path, cohort: Path, tmp_path: Path) -> None:
    rows = pd.read_csv(cohort / "ct.csv").head(3)
    (tmp_path / "ct").mkdir()
    for path in rows["image_path"].iloc[[0, 2]]:
        shutil.copy(cohort / path, tmp_path / path)
    rows.to_csv(tmp_path / "some.csv", index=False)
    assert main(["predict", str(finished_run), str(tmp_path / "some.csv"), "--out", str(tmp_path / "out")]) == 1
    table = pd.read_csv(tmp_path / "out" / "probabilities.csv")
    assert list(table["scan"]) == list(rows["image_id"])
    assert list(table["study_id"]) == list(rows["study_id"])
    assert list(table["status"]) == ["read", "unreadable", "read"]


@pytest.mark.parametrize(("given", "says"), [("nowhere", "no such file"), ("empty", "no scans in this folder")])
def test_nothing_to_read(
    finished_run: Path, tmp_path: Path, given: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(finished_run), str(tmp_path / given), "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the workers have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.full
@pytest.mark.usefixtures("one_thread")
def test_workers_write_what_one_process_writes(finished_run: Path, folder: Path, tmp_path: Path) -> None:
    """To the bit, the parts too; the scan that is cut off costs no other; what stands is not computed again."""
    for number in range(3):
        shutil.copy(folder / "a.nii.gz", folder / f"c{number}.nii.gz")
    written = []
    for workers in (1, 2):
        out = tmp_path / f"out-{workers}"
        command = ["predict", str(finished_run), str(folder), "--out", str(out), "--report", "--saliency"]
        assert main([*command, "--workers", str(workers)]) == 1
        files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
        written.append({path: (out / path).read_bytes() for path in files})
    assert len(written[0]) > 20
    assert written[0] == written[1]
    part = tmp_path / "out-2" / "parts" / "a.nii.gz.json"
    before = [(path, path.stat().st_mtime_ns) for path in part.parent.iterdir() if path != part]
    part.unlink()
    assert main([*command, "--workers", "2"]) == 1
    assert part.read_bytes() == written[0][part.relative_to(tmp_path / "out-2")]
    assert [(path, path.stat().st_mtime_ns) for path, _ in before] == before


def test_a_scan_that_a_library_fails_on_costs_no_other(
    finished_run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CTModel.predict_volume

    def failing(self: CTModel, scan: object, **more: object) -> object:
        if scan.path.name == "a.nii.gz":  # type: ignore[attr-defined]
            raise RuntimeError("a kernel\nfailed")
        return real(self, scan, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(CTModel, "predict_volume", failing)
    out = tmp_path / "out"
    assert main(["predict", str(finished_run), str(folder), "--out", str(out)]) == 1
    table = pd.read_csv(out / "probabilities.csv", keep_default_na=False).set_index("scan")
    assert table["status"].to_list() == ["unreadable", "unreadable", "read"]
    assert table.at["a.nii.gz", "reason"].endswith("a.nii.gz: RuntimeError: a kernel failed")


def test_no_workers(finished_run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["predict", str(finished_run), str(folder), "--out", str(tmp_path / "out"), "--workers", "0"]
    assert main(command) == 2
    assert "--workers is 0" in capsys.readouterr().err
