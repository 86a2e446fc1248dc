"""Slices: upright, the right way round, true in proportion, whatever the file's axes."""

from __future__ import annotations

import base64
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ctx_distill.data.io.volume import Volume
from ctx_distill.reporting import pictures
from ctx_distill.reporting.pictures import Box, Plane


def marked_volume(blob: tuple[float, float, float]) -> Volume:
    """A 160 x 120 x 80 mm (Left, Posterior, Superior) block of water with one bright blob at `blob`, mm of its shares."""
    size = (20, 30, 40)  # z, y, x of 4 mm
    hu = np.zeros(size, dtype=np.int16)
    centre = [round(share * (n - 1)) for share, n in zip(blob[::-1], size)]
    hu[tuple(slice(c - 1, c + 2) for c in centre)] = 1000
    affine = np.zeros((4, 4))
    affine[0, 2] = affine[1, 1] = affine[2, 0] = 4.0
    affine[:, 3] = [-80.0, -60.0, 100.0, 1.0]
    return Volume(hu, affine, Path("blob"))


def reorder(volume: Volume, order: tuple[int, ...], flips: tuple[bool, ...]) -> Volume:
    """The same scan in the same place, stored in another axis order and direction."""
    voxels: NDArray[np.int16] = volume.voxels.transpose(order).astype(np.int16)
    affine = volume.affine_lps[:, [*order, 3]].copy()
    for axis, flip in enumerate(flips):
        if flip:
            affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
            affine[:3, axis] *= -1
            voxels = np.flip(voxels, axis)
    return Volume(np.ascontiguousarray(voxels), affine, volume.path)


# Blob at the patient's right (low Left), anterior (low Posterior), superior.
RIGHT_ANTERIOR_SUPERIOR = (0.15, 0.2, 0.85)


@pytest.mark.parametrize(
    ("plane", "row", "column"),
    [("axial", 0.2, 0.15), ("coronal", 0.15, 0.15), ("sagittal", 0.15, 0.2)],
)
def test_a_blob_at_right_anterior_superior(plane: Plane, row: float, column: float) -> None:
    volume = marked_volume(RIGHT_ANTERIOR_SUPERIOR)
    box = pictures.scan_box(volume)
    low, high = np.array(box.low), np.array(box.high)
    point = tuple(low + np.array(RIGHT_ANTERIOR_SUPERIOR) * (high - low))
    image = pictures.sample_plane(volume, plane, (point[0], point[1], point[2]), box)
    bright = np.argwhere(image > 500)
    assert bright.mean(axis=0) / image.shape == pytest.approx([row, column], abs=0.06)


def test_every_axis_order_gives_the_same_pictures() -> None:
    volume = marked_volume(RIGHT_ANTERIOR_SUPERIOR)
    box = pictures.scan_box(volume)
    point = (-56.0, -36.0, 168.0)
    wanted = {plane: pictures.sample_plane(volume, plane, point, box) for plane in ("axial", "coronal", "sagittal")}
    assert all(image.max() > 900 for image in wanted.values())
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((False, True), repeat=3):
            other = reorder(volume, order, flips)
            assert pictures.scan_box(other) == box
            for plane, image in wanted.items():
                np.testing.assert_allclose(pictures.sample_plane(other, plane, point, box), image, atol=1e-2)


def test_thick_slices_keep_their_proportions() -> None:
    volume = Volume(np.zeros((12, 60, 50), dtype=np.int16), np.diag([1.0, 1.0, 1.0, 1.0]), Path("thick"))
    affine = np.zeros((4, 4))
    affine[0, 2], affine[1, 1], affine[2, 0], affine[3, 3] = 2.0, 2.0, 10.0, 1.0
    volume = Volume(volume.voxels, affine, volume.path)
    box = pictures.scan_box(volume)
    assert np.subtract(box.high, box.low) == pytest.approx([100, 120, 120])
    coronal = pictures.sample_plane(volume, "coronal", (50.0, 60.0, 60.0), box)
    assert coronal.shape[0] / coronal.shape[1] == pytest.approx(1.2, rel=0.02)
    axial = pictures.sample_plane(volume, "axial", (50.0, 60.0, 60.0), box)
    assert axial.shape[0] / axial.shape[1] == pytest.approx(1.2, rel=0.02)


def test_an_oblique_scan_stands_upright() -> None:
    straight = marked_volume((0.5, 0.5, 0.5))
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    oblique = Volume(straight.voxels, turn @ straight.affine_lps, straight.path)
    box = Box((-40, -40, 110), (40, 40, 170))
    middle = straight.affine_lps @ np.array([10, 14, 20, 1])
    for volume, centre in ((straight, middle), (oblique, turn @ middle)):
        image = pictures.sample_plane(volume, "axial", tuple(centre[:3]), box)
        found = np.argwhere(image > 500).mean(axis=0) / image.shape * 80 - 40
        assert found == pytest.approx([centre[1], centre[0]], abs=2)


def test_planes_go_through_the_lungs(finished: Path) -> None:
    from ctx_distill.data.io.volume import read_volume

    volume = read_volume(finished.parent / "data/ct/scan0.nii.gz")
    body, point = pictures.find_lungs(volume)
    axial = pictures.sample_plane(volume, "axial", point, body)
    assert 0.15 < np.mean(axial < -700) < 0.7
    coronal = pictures.sample_plane(volume, "coronal", point, body)
    half = coronal.shape[1] // 2
    # The heart lies on the patient's left, which is the right of the picture; the left lung ends higher.
    assert (coronal[:, :half] < -700).mean() > (coronal[:, half:] < -700).mean()
    sagittal = pictures.sample_plane(volume, "sagittal", point, body)
    assert (sagittal < -700).mean() > 0.2


def test_a_scan_without_air_shows_its_middle() -> None:
    volume = marked_volume((0.5, 0.5, 0.5))
    _, point = pictures.find_lungs(volume)
    assert point == pytest.approx((-2.0, -2.0, 138.0), abs=3)
    shown = pictures.ct_pictures(volume)
    assert shown.axial.letters == "RLAP"
    assert shown.coronal.letters == "RLSI"
    assert shown.sagittal.letters == "APSI"
    assert shown.axial.crossings == pytest.approx((0.5, 0.5), abs=0.05)


def test_encoding_keeps_the_corner() -> None:
    grey = np.zeros((60, 80), dtype=np.float32)
    grey[:10, :10] = 1
    uri = pictures.encode(grey)
    assert uri.startswith("data:image/jpeg;base64,")
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    assert image.shape == (60, 80)
    assert image[:8, :8].mean() > 200
    assert image[20:, 20:].mean() < 10
