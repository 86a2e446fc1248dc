"""`ctx-distill check`: planted faults are found, each by its name; sound phantoms and real scans are let be."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ctx_distill.commands.main import main
from ctx_distill.data.io.scan_file import ScanFile
from ctx_distill.data.io.volume import read_volume
from ctx_distill.data.quality.scan import HISTOGRAM, check_scan

Plant = Callable[[np.ndarray[Any, Any], Any], tuple[np.ndarray[Any, Any], Any]]


def planted(source: Path, target: Path, change: Plant) -> ScanFile:
    image = nib.load(source)
    hu, affine = change(np.asarray(image.dataobj).astype(np.int16), image.affine.copy())
    nib.Nifti1Image(hu, affine).to_filename(target)
    return ScanFile(target)


def without_left_lung(hu: np.ndarray[Any, Any], affine: Any) -> tuple[np.ndarray[Any, Any], Any]:
    """Every voxel of lung in the patient's left half becomes soft tissue."""
    left_first = affine[0, 0] < 0  # RAS affine: x falls towards the patient's left
    half = np.zeros(hu.shape[0], dtype=bool)
    half[hu.shape[0] // 2 :] = True
    half = half if left_first else half[::-1]
    body = np.zeros(hu.shape, dtype=bool)
    from scipy import ndimage

    outside, _ = ndimage.label(hu < -500, structure=np.ones((3, 3, 3)))
    edge = np.unique(
        np.concatenate([outside[0].ravel(), outside[-1].ravel(), outside[:, 0].ravel(), outside[:, -1].ravel()])
    )
    body = ~np.isin(outside, edge[edge > 0]) & (hu < -500)
    body[~half] = False
    return np.where(body, 40, hu).astype(np.int16), affine


PLANTED: dict[str, tuple[str, str, Plant]] = {
    "intercept applied twice": ("error", "slope_twice", lambda hu, a: (hu - 1024, a)),
    "intercept not applied": ("error", "slope_missing", lambda hu, a: (hu + 1024, a)),
    "scaled to 0..255": ("error", "not_hu", lambda hu, a: (((hu + 1024) // 16).clip(0, 255), a)),
    "one value": ("error", "empty", lambda hu, a: (np.full_like(hu, -1000), a)),
    "cut off and padded": ("warning", "blank_slices", lambda hu, a: (np.where(np.arange(hu.shape[2]) < hu.shape[2] // 3, -1024, hu), a)),
    "metres in the header": ("error", "unreadable", lambda hu, a: (hu, a * np.diag([1e-3, 1e-3, 1e-3, 1.0]))),
    "centimetres in the header": ("warning", "extent", lambda hu, a: (hu, a @ np.diag([0.1, 0.1, 0.1, 1.0]))),
    "oblique": ("warning", "orientation", lambda hu, a: (hu, rotation(35.0) @ a)),
    "a missing lung": ("warning", "lung_missing", without_left_lung),
    "half a chest": ("warning", "lung_missing", lambda hu, a: (hu[: 180 // 4], a)),
}  # fmt: skip


def rotation(degrees: float) -> np.ndarray[Any, Any]:
    turn = np.eye(4)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn[:2, :2] = [[c, -s], [s, c]]
    return turn


@pytest.fixture
def data(cohort: Path, tmp_path: Path) -> Path:
    """The cohort's CTs, to spoil."""
    folder = tmp_path / "data"
    shutil.copytree(cohort / "ct", folder / "ct")
    shutil.copy(cohort / "ct.csv", folder)
    return folder


def check(manifest: Path, *options: str) -> tuple[int, pd.DataFrame, list[dict[str, str]], str]:
    """Exit status, table, exclude list and page."""
    out = manifest.with_suffix(".check")
    status = main(["check", str(manifest), "--workers", "1", *options])
    with (out / "exclude.csv").open() as file:
        excluded = list(csv.DictReader(file))
    return (
        status,
        pd.read_csv(out / "check.csv", dtype=str, keep_default_na=False).set_index("image_id"),
        excluded,
        (out / "index.html").read_text(),
    )


@pytest.mark.parametrize("name", PLANTED)
def test_each_planted_fault_is_named(cohort: Path, tmp_path: Path, name: str) -> None:
    severity, code, change = PLANTED[name]
    source = sorted((cohort / "ct").glob("*.nii.gz"))[0]
    before = check_scan(ScanFile(source))[1]
    scan = planted(source, tmp_path / "a.nii.gz", change)
    if code == "unreadable":
        from ctx_distill.errors import InputError

        with pytest.raises(InputError, match="is it in another unit"):
            check_scan(scan)
        return
    faults = check_scan(scan)[1]
    assert not before
    assert (severity, code) in {(fault.severity, fault.code) for fault in faults}, faults


def test_sound_phantoms_are_let_be_and_measured(cohort: Path) -> None:
    for source in sorted((cohort / "ct").glob("*.nii.gz")):
        facts, faults, _ = check_scan(ScanFile(source))
        assert not faults, (source.name, faults)
        image = nib.load(source)
        assert sorted(facts["shape"]) == sorted(image.shape)
        np.testing.assert_allclose(sorted(facts["spacing_mm"]), sorted(image.header.get_zooms()), rtol=1e-3)
        # the file's axes from slowest to fastest, in nibabel's words for RAS+
        assert facts["orientation"][::-1] == "".join(nib.aff2axcodes(image.affine))
        values = np.asarray(image.dataobj).ravel()
        np.testing.assert_allclose(
            [facts["hu_1"], facts["hu_50"], facts["hu_99"]], np.percentile(values, (1, 50, 99)), rtol=0.1, atol=5
        )
        counts = np.histogram(values.clip(*HISTOGRAM[:2]), bins=HISTOGRAM[2], range=HISTOGRAM[:2])[0] / len(values)
        np.testing.assert_allclose(facts["histogram"], counts, atol=0.01)


def test_real_scans_and_the_crop_of_one_lung(
    real_mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["check", str(real_mini / "ct.csv"), "--out", str(out), "--workers", "1"]) == 0
    table = pd.read_csv(out / "check.csv", keep_default_na=False).set_index("image_id")
    assert (table["errors"] == "").all()
    assert [name for name, text in table["warnings"].items() if text] == ["elastix_crop"]
    assert (
        "157.1 mm from right to left; expected at least 200 mm for two lungs" in table.loc["elastix_crop", "warnings"]
    )
    assert main(["check", str(real_mini / "xray.csv"), "--out", str(tmp_path / "x"), "--workers", "1"]) == 0
    assert "26 images, 0 with errors, 0 with warnings" in capsys.readouterr().out


@pytest.mark.full
def test_table_page_list_and_status(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = pd.read_csv(data / "ct.csv", dtype=str, keep_default_na=False)
    names = frame["image_id"].tolist()
    paths = [data / path for path in frame["image_path"]]
    others = frame["patient_id"] != frame["patient_id"][0]
    copy = int(np.flatnonzero(others & (frame["split"] != frame["split"][0]))[0])
    shutil.copy(paths[0], paths[copy])
    used = {0, copy}
    truncated, twice, gone, told, blank = [i for i in range(len(frame)) if i not in used][:5]
    paths[truncated].write_bytes(paths[truncated].read_bytes()[:900])
    planted(paths[twice], paths[twice], lambda hu, a: (hu - 1024, a))
    paths[gone].unlink()
    frame.loc[told, "findings"] = "Compared with 07.02.2022. Read by Dr. Jane Doe. MRN: 1234567."
    frame.loc[blank, ["findings", "impression"]] = ""
    frame.to_csv(data / "ct.csv", index=False)
    status, table, excluded, page = check(data / "ct.csv")
    assert status == 1
    assert {row["image_id"] for row in excluded} == {names[i] for i in (0, copy, truncated, twice, gone)}
    assert "truncated" in table.loc[names[truncated], "errors"] or "ends" in table.loc[names[truncated], "errors"]
    assert "which does not exist" in table.loc[names[gone], "errors"]
    assert "slope_twice" in table.loc[names[twice], "errors"]
    assert f"the same voxels as {names[copy]}, of another patient, in splits" in table.loc[names[0], "errors"]
    assert [kind in table.loc[names[told], "warnings"] for kind in ("text_date", "text_name", "text_number")] == [
        True
    ] * 3
    assert "no_text" in table.loc[names[blank], "notes"]
    assert table.index.tolist() == names  # the manifest's order, whichever was done first
    assert [row["image_id"] for row in excluded] == [name for name in names if table.loc[name, "errors"]]
    out = capsys.readouterr().out
    assert f"{len(frame)} images, 5 with errors, 1 with warnings" in out
    assert "Doe" not in page
    assert page.count("data:image/jpeg;base64,") == 3  # the two copies and the scan of a doubled intercept
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.full
def test_it_goes_on_where_it_was_stopped(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ctx_distill.reporting import manifest_check as module

    _, table, _, _ = check(data / "ct.csv")
    rows = data / "ct.check/rows.jsonl"
    lines = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(b"".join(lines[:9]) + lines[9][:40])
    seen: list[int] = []
    run = module.in_processes

    def counting(title: str, function: Any, items: Any, total: int, workers: int | None = None, **more: Any) -> Any:
        seen.append(total)
        return run(title, function, items, total, workers, **more)

    monkeypatch.setattr(module, "in_processes", counting)
    _, again, _, _ = check(data / "ct.csv")
    assert seen == [len(lines) - 9]
    pd.testing.assert_frame_equal(table, again)
    # another file under the same name is looked at again
    paths = sorted((data / "ct").glob("*.nii.gz"))
    planted(paths[0], paths[0], lambda hu, a: (hu + 1024, a))
    status, spoiled, _, _ = check(data / "ct.csv")
    assert (seen[-1], status) == (1, 1)
    assert (spoiled["errors"] != "").sum() == 1
    assert len(spoiled) == len(table)


def test_a_scan_that_ends_its_process_is_an_error_of_that_scan(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ctx_distill.reporting import manifest_check as module

    def dying(title: str, function: Any, items: Any, total: int, workers: int | None, died: Any) -> Any:
        return ((image, died(image) if place == 1 else function(image)) for place, image in enumerate(items))

    monkeypatch.setattr(module, "in_processes", dying)
    status, table, excluded, _ = check(data / "ct.csv")
    assert status == 1
    assert [row["image_id"] for row in excluded] == [table.index[1]]
    assert "the process that read it was killed" in table["errors"].iloc[1]


def test_prepared_items_are_compared(
    cohort: Path, tmp_path: Path, tiny_preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, prepared = tmp_path / "out", tmp_path / "prepared"
    assert main(["prepare", str(cohort / "ct.csv"), str(prepared), "--preset", str(tiny_preset), "--workers", "1"]) == 0
    command = ["check", str(cohort / "ct.csv"), "--out", str(out), "--prepared", str(prepared), "--workers", "1"]
    assert main(command) == 0
    item = next(iter(sorted((prepared / "items").rglob("*.npy"))))
    content = bytearray(item.read_bytes())
    content[-1] ^= 1
    item.write_bytes(content)
    assert main([*command[:2], "--out", str(tmp_path / "new"), *command[4:]]) == 1
    assert "error, prepared: 1" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "new/check.csv", keep_default_na=False)
    assert table["errors"].str.contains("checksum mismatch, the file is damaged").sum() == 1
    assert main(["check", str(cohort / "ct.csv"), "--prepared", str(tmp_path)]) == 2
    assert "prepare the folder first" in capsys.readouterr().err


def test_films(cohort: Path, tmp_path: Path) -> None:
    source = sorted((cohort / "xray").glob("*.png"))[0]
    grey = np.asarray(Image.open(source).convert("L"))
    Image.fromarray(grey).save(tmp_path / "good.png")
    Image.fromarray(255 - grey).save(tmp_path / "turned.png")
    Image.fromarray(np.full_like(grey, 90)).save(tmp_path / "blank.png")
    Image.fromarray(grey[:, : grey.shape[1] // 3]).save(tmp_path / "strip.png")
    rows = [f"{n},{n},train,{n}.png,Clear lungs {n}.,,frontal" for n in ("good", "turned", "blank", "strip")]
    (tmp_path / "xray.csv").write_text(
        "study_id,patient_id,split,image_path,findings,impression,view\n" + "\n".join(rows) + "\n"
    )
    status, table, excluded, _ = check(tmp_path / "xray.csv")
    assert status == 1
    assert [row["image_id"] for row in excluded] == ["blank"]
    assert table["warnings"].map(bool).to_dict() == {"good": False, "turned": True, "blank": False, "strip": True}
    assert "inverted" in table.loc["turned", "warnings"]


def test_an_output_that_cannot_be_written(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["check", str(cohort / "ct.csv"), "--out", str(tmp_path / "file/out"), "--workers", "1"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_read_volume_agrees_with_the_hash(cohort: Path, tmp_path: Path) -> None:
    """A copy under another compression, header and name has the same content."""
    source = sorted((cohort / "ct").glob("*.nii.gz"))[0]
    image = nib.load(source)
    again = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    again.header["descrip"] = b"another"
    again.to_filename(tmp_path / "b.nii")
    assert check_scan(ScanFile(source))[0]["content"] == check_scan(ScanFile(tmp_path / "b.nii"))[0]["content"]
    assert json.dumps(check_scan(ScanFile(source))[0], allow_nan=False)
    assert read_volume(source).voxels.shape == read_volume(tmp_path / "b.nii").voxels.shape
