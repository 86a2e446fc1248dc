"""What the page is told of a scan: where a map is strongest, what is thinned, what lies outside; and NiiVue's lock."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ctx_distill.data.io.volume import Volume
from ctx_distill.explorer import viewer
from ctx_distill.explorer.answers import Answer, FindingAnswer, SaliencyMap
from ctx_distill.explorer.results import thinning, where, write_answer, write_scan


def scan_of(shape: tuple[int, int, int], flip: bool = False) -> Volume:
    """2 mm voxels from the origin on; flipped: the file's first axis grows towards the patient's Right, not Superior."""
    voxels = np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])[[2, 1, 0, 3]]  # (k0, k1, k2) along z, y, x
    if flip:
        affine = np.diag([-2.0, 2.0, 2.0, 1.0])
    return Volume(voxels, affine, Path("x"))


@pytest.mark.parametrize(("z", "side", "level"), [(1, "right", "lower"), (9, "left", "upper")])
def test_a_place_has_the_patients_side_and_level(z: int, side: str, level: str) -> None:
    scan = scan_of((11, 11, 11))
    values = np.zeros((11, 11, 11), np.float32)
    values[z, 5, z] = 1
    found = where(scan, SaliencyMap(values, scan.affine_lps))
    assert found["words"] == f"patient's {side}, {level} third of the scan, centre"
    # NiiVue counts towards Right, Anterior, Superior.
    assert found["mm"] == [-2.0 * z, -10.0, 2.0 * z]


def test_sides_follow_the_affine_and_not_the_array() -> None:
    scan = scan_of((11, 11, 11), flip=True)
    values = np.zeros((11, 11, 11), np.float32)
    values[10, 5, 5] = 1  # -20 mm to the Left
    assert where(scan, SaliencyMap(values, scan.affine_lps))["words"].startswith("patient's right, middle third")


def test_what_lies_outside_of_the_scan_is_not_shown(tmp_path: Path) -> None:
    scan = scan_of((6, 6, 6))
    # A grid of twice the scan's size around it: strongest in the air that the model was given beyond it.
    affine = scan.affine_lps.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.array([3.0, 3.0, 3.0])
    values = np.zeros((12, 12, 12), np.float32)
    values[0, 0, 0], values[5, 4, 8] = 9.0, 1.0
    nowhere = np.zeros((12, 12, 12), np.float32)
    nowhere[11, 11, 11] = 1.0
    write_answer(
        tmp_path, scan,
        Answer([FindingAnswer("low", 0.1, SaliencyMap(nowhere, affine)), FindingAnswer("high", 0.9, SaliencyMap(values, affine))]),
        {},
    )  # fmt: skip
    high, low = json.loads((tmp_path / "result.json").read_text())["findings"]
    assert (high["name"], low["name"], low["place"]) == ("high", "low", None)
    assert high["place"]["mm"] == [-10.0, -2.0, 4.0]
    shown = np.asarray(nib.load(tmp_path / "saliency-0.nii").dataobj)
    assert np.argwhere(shown).tolist() == [[8, 4, 5]]
    assert not (tmp_path / "saliency-1.nii").exists()


def test_a_large_scan_is_thinned_and_stays_in_its_place(tmp_path: Path) -> None:
    assert thinning((100, 100, 100), 2) == [1, 1, 1]
    assert np.prod([-(-n // s) for n, s in zip((600, 512, 512), thinning((600, 512, 512), 80))]) <= 80e6
    scan = scan_of((9, 8, 7))
    told = write_scan(tmp_path, scan, 100e-6)
    shown = nib.load(tmp_path / "scan.nii")
    z, y, x = told["steps"][::-1]
    np.testing.assert_array_equal(np.asarray(shown.dataobj), scan.voxels[::z, ::y, ::x].T)
    assert shown.shape[0] * shown.shape[1] * shown.shape[2] <= 100
    # Voxel (1, 1, 1) of what is shown lies where voxel (step, step, step) of the scan does, in RAS mm.
    np.testing.assert_allclose((shown.affine @ [1, 1, 1, 1])[:3], [-2 * x, -2 * y, 2 * z])


def test_niivue_is_locked_by_hash_and_by_no_address() -> None:
    text = (viewer.FOLDER / "package-lock.json").read_text()
    assert "://" not in text
    packages = json.loads(text)["packages"]
    assert all(package["integrity"].startswith("sha512-") for name, package in packages.items() if name)
    assert "Redistribution and use in source and binary forms" in viewer.licences()
