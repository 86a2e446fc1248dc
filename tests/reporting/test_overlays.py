"""Saliency over slices: on the right side in every plane, in the ramp's colours, and what is said where there is none."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ctx_distill.data.io.volume import read_volume
from ctx_distill.reporting.overlays import RAMP, Shown, colour, map_file, read_record, show_finding

KEY = ("zero_shot", "ct1", "lung nodule")
RECORD = {KEY: {"file": "map.nii.gz", "method": "grad-cam"}}
PLANES = ("axial", "coronal", "sagittal")


def body() -> NDArray[np.float32]:
    """(x to Right, y to Anterior, z to Superior): a block of tissue with two lungs in air, 5 mm voxels."""
    hu = np.full((60, 50, 44), -1000.0, dtype=np.float32)
    hu[6:54, 6:44] = 40
    for lung in (slice(12, 26), slice(34, 48)):
        hu[lung, 12:38, 6:36] = -850
    return hu


def write(path: Path, values: NDArray[np.float32], order: str = "xyz") -> None:
    """Write voxels whose axes are Right, Anterior, Superior as NIfTI; `order` "zyx" stores them turned and flipped."""
    affine = np.diag([5.0, 5.0, 5.0, 1.0])  # NIfTI's world is Right, Anterior, Superior
    affine[:3, 3] = [-140, -120, -300]
    image = nib.Nifti1Image(values, affine)
    if order == "zyx":
        turned = nib.orientations.axcodes2ornt(("I", "P", "L"))
        image = image.as_reoriented(nib.orientations.ornt_transform(nib.orientations.io_orientation(affine), turned))
    nib.save(image, path)


def heat(picture_uri: str) -> NDArray[np.uint8]:
    assert picture_uri.startswith("data:image/png;base64,")
    raw = base64.b64decode(picture_uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGBA"))


def shown(folder: Path, order: str, hot: NDArray[np.float32]) -> Shown:
    (folder / "saliency").mkdir()
    write(folder / "ct.nii.gz", body(), order)
    write(folder / "saliency" / "map.nii.gz", hot, order)
    return show_finding(folder, RECORD, KEY, read_volume(folder / "ct.nii.gz"), PLANES)


@pytest.mark.parametrize("order", ["xyz", "zyx"])
def test_a_hot_voxel_lies_at_its_place_in_all_three_planes(tmp_path: Path, order: str) -> None:
    """One voxel in the patient's left lung (low x of RAS), behind the middle (low y) and high up (high z)."""
    hot = np.zeros_like(body())
    hot[15, 16, 30] = 2.5
    found = shown(tmp_path, order, hot)
    assert (found.method, found.problem) == ("grad-cam", "")
    # Shares of the box around the body (8 mm margin and half a coarse voxel, within the scan) from the picture's left and top.
    left = (54 - 15 - 0.5) / 48  # from the patient's right
    down = (44 - 16 - 0.5) / 38  # from anterior
    below = (43 - 30 + 0.5) / 44  # from superior; the box is as high as the scan
    wanted = {"axial": (left, down), "coronal": (left, below), "sagittal": (down, below)}
    assert [title.split(",")[0].lower() for title, _ in found.pictures] == list(PLANES)
    for plane, (_, picture) in zip(PLANES, found.pictures, strict=True):
        alpha = heat(picture.heat)[..., 3]
        assert alpha.shape == (picture.height, picture.width)
        rows, columns = np.nonzero(alpha)
        assert len(rows) > 0
        spread = max(np.ptp(rows) / alpha.shape[0], np.ptp(columns) / alpha.shape[1])
        assert spread < 0.06  # one voxel of 5 mm in some 220 mm, spread to its neighbours
        x, y = (columns.mean() + 0.5) / alpha.shape[1], (rows.mean() + 0.5) / alpha.shape[0]
        assert (x, y) == pytest.approx(wanted[plane], abs=0.04), plane
        assert picture.crossings == pytest.approx((x, y), abs=0.02)
        assert x > 0.5  # the patient's left, or posterior, is on the picture's right
        assert (y > 0.5) == (plane == "axial")


def test_a_peak_outside_of_the_body_is_told_and_the_slices_go_inside(tmp_path: Path) -> None:
    hot = np.zeros_like(body())
    hot[1, 1, 40] = 9.0
    hot[39:42, 20:23, 10:13] = 3.0
    found = shown(tmp_path, "xyz", hot)
    assert "outside the body; the slices pass through its maximum inside the body" in found.problem
    alpha = heat(found.pictures[0][1].heat)[..., 3]
    columns = np.nonzero(alpha)[1]
    assert columns.mean() < alpha.shape[1] / 2  # high x of RAS: the patient's right, on the left


def test_maps_that_cannot_be_shown_are_told(tmp_path: Path) -> None:
    write(tmp_path / "ct.nii.gz", body())
    (tmp_path / "saliency").mkdir()
    scan = read_volume(tmp_path / "ct.nii.gz")
    assert "There is no saliency map" in show_finding(tmp_path, {}, KEY, scan, PLANES).problem
    assert "could not be read" in show_finding(tmp_path, RECORD, KEY, scan, PLANES).problem
    for values, said in (
        (np.ones((60, 50, 40), np.float32), "on another grid than the scan"),
        (0 * body(), "0 everywhere"),
    ):
        write(tmp_path / "saliency" / "map.nii.gz", values)
        found = show_finding(tmp_path, RECORD, KEY, scan, PLANES)
        assert said in found.problem
        assert [picture.heat for _, picture in found.pictures] == ["", "", ""]
    (tmp_path / "saliency" / "saliency.json").write_text('{"maps": [3')
    assert read_record(tmp_path) == {}


def test_colours_are_viridis_and_low_values_are_clear() -> None:
    for name, share in zip(RAMP, np.linspace(0, 1, 8), strict=True):
        wanted = np.round(np.array(matplotlib.colormaps["viridis"](share)[:3]) * 255)
        assert np.abs(np.array([int(name[i : i + 2], 16) for i in (1, 3, 5)]) - wanted).max() <= 2
    drawn = heat(colour(np.array([[0.0, 0.19, 0.21, 1.0]], dtype=np.float32)))[0]
    assert drawn[:, 3].tolist()[:2] == [0, 0]
    assert 0 < drawn[2, 3] < drawn[3, 3] < 255  # the slice stays visible below
    assert drawn[2, :3].tolist() == [0x44, 0x01, 0x54]
    assert drawn[3, :3].tolist() == [0xFD, 0xE7, 0x25]


def test_two_names_never_share_a_file() -> None:
    names = ["a b", "a_b", "a/b", "../a", "..", "é"]
    assert map_file("zero_shot", "CT 1", "lung nodule").endswith("/lung_nodule.nii.gz")
    files = {map_file("zero_shot", study, finding) for study in names for finding in names[1:]}
    assert len(files) == len(names) * len(names[1:])
    assert not [file for file in files if ".." in file.split("/") or file.startswith("/") or file.count("/") != 2]
