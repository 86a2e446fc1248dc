"""The digital radiograph of a scan: line integrals by hand, orientation, tone, framing, real scans."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ctx_distill.data.io.volume import Volume, read_volume
from ctx_distill.data.transforms.projection import (
    BONE_GAIN,
    SIDE,
    WATER_PER_MM,
    frontal_projection,
    line_integrals,
    square_projection,
)


def scan(hu_zyx: NDArray[np.float32], spacing: tuple[float, float, float] = (3.0, 3.0, 3.0)) -> Volume:
    """(z, y, x) growing towards Superior, Posterior, Left."""
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, ::-1] * np.array(spacing)
    return Volume(hu_zyx.astype(np.int16), affine, Path("scan"))


def stored(volume: Volume, order: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> Volume:
    """The same scan with its array axes in another order and direction; the affine says so."""
    voxels, affine = volume.voxels.transpose(order), volume.affine_lps.copy()
    affine[:3, :3] = affine[:3, list(order)]
    for axis, flip in enumerate(flips):
        if flip:
            affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
            affine[:3, axis] *= -1
            voxels = np.flip(voxels, axis)
    return Volume(np.ascontiguousarray(voxels), affine, volume.path)


def chest() -> Volume:
    """Soft tissue with two lungs; a heart on the patient's left; a bone top right of the picture's centre line."""
    hu = np.full((40, 36, 50), -1000.0, dtype=np.float32)
    hu[2:38, 4:32, 4:46] = 40
    hu[10:34, 8:28, 8:22] = -850
    hu[10:34, 8:28, 28:42] = -850
    hu[12:22, 10:20, 24:36] = 40
    hu[30:33, 12:15, 34:40] = 700
    return scan(hu)


def test_a_box_of_water_and_one_of_bone_by_hand() -> None:
    hu = np.full((20, 30, 24), -1000.0, dtype=np.float32)
    hu[5:15, 8:28, 4:12] = 0  # 20 voxels of 4 mm
    hu[5:15, 8:13, 16:20] = 1100  # 5 voxels
    volume = scan(hu, (2.5, 4.0, 2.5))
    passed = np.exp(-line_integrals(volume, 2.5))
    expected = np.ones((20, 24))
    expected[5:15, 4:12] = np.exp(-0.0175 * 80)
    expected[5:15, 16:20] = np.exp(-0.0175 * 20 * (1 + 1.1 + 0.7 * 1.0))
    assert (WATER_PER_MM, BONE_GAIN) == (0.0175, 0.7)
    np.testing.assert_allclose(passed, expected[::-1], rtol=1e-5)


def test_values_below_air_do_not_count() -> None:
    hu = chest().voxels.copy()
    hu[hu == -1000] = -3024  # what scanners write beyond their circle
    padded = Volume(hu, chest().affine_lps, Path("scan"))
    np.testing.assert_array_equal(line_integrals(padded), line_integrals(chest()))


def test_it_is_upright_with_the_patients_left_on_the_right() -> None:
    film = line_integrals(chest(), 3.0)
    assert film.shape == (40, 50)
    heart = film[40 - 17]
    assert heart[33] > 1.5 * heart[50 - 33]
    assert film[40 - 32, 36] > film[40 - 32, 50 - 36] + 0.1  # the bone, high in the picture
    assert film[39 - 5, 15] > film[39 - 32, 15] + 0.5  # no lung as far down as z = 5


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize(
    "flips", [(False, False, False), (True, False, True), (False, True, False), (True, True, True)]
)
def test_how_the_file_stores_the_scan_does_not_matter(
    order: tuple[int, int, int], flips: tuple[bool, bool, bool]
) -> None:
    other = stored(chest(), order, flips)
    np.testing.assert_allclose(line_integrals(other), line_integrals(chest()), atol=1e-5)
    np.testing.assert_allclose(frontal_projection(other), frontal_projection(chest()), atol=1e-5)


def test_an_oblique_scan_is_straightened() -> None:
    angle = np.deg2rad(12)
    turn = np.eye(4)
    turn[:3, :3] = [[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]
    # A ball is the same from everywhere: tilting the gantry must not change its film.
    z, y, x = np.ogrid[:40, :36, :50]
    ball = np.where((z - 19.5) ** 2 + (y - 17.5) ** 2 + (x - 24.5) ** 2 < 12**2, 0.0, -1000.0).astype(np.float32)
    straight = scan(ball)
    tilted = Volume(straight.voxels, turn @ straight.affine_lps, Path("scan"))
    film = line_integrals(tilted, 3.0)
    peak = WATER_PER_MM * 24 * 3
    assert film.max() == pytest.approx(peak, rel=0.05)
    assert film.sum() == pytest.approx(line_integrals(straight, 3.0).sum(), rel=0.02)
    rows, columns = np.flatnonzero(film.max(1) > peak / 2), np.flatnonzero(film.max(0) > peak / 2)
    assert abs(len(rows) - len(columns)) <= 1


def test_the_sum_does_not_depend_on_the_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = line_integrals(chest())
    monkeypatch.setattr("ctx_distill.data.transforms.projection._SLAB", 1 << 10)
    np.testing.assert_array_equal(line_integrals(chest()), whole)


def test_the_tone_keeps_the_order_of_the_integrals_and_the_frame_the_body() -> None:
    wide = np.full((40, 60, 120), -1000.0, dtype=np.float32)
    wide[:, 10:46, 30:80] = chest().voxels
    film, picture = line_integrals(scan(wide), 3.0), frontal_projection(scan(wide), 3.0)
    assert picture.shape == (36, 42)
    inside = film[2:38, 34:76]
    flat = np.argsort(inside, axis=None)
    assert (np.diff(picture.reshape(-1)[flat]) >= 0).all()
    assert 0 <= picture.min() < 0.2
    assert 0.8 < picture.max() <= 1


def test_the_square_holds_the_whole_picture_in_proportion() -> None:
    square = square_projection(chest()).numpy()
    assert square.shape == (SIDE, SIDE)
    assert square.dtype == np.float32
    assert square.min() >= 0
    assert square.max() <= 1
    picture = frontal_projection(chest())
    band = round(SIDE * picture.shape[0] / picture.shape[1])
    top = (SIDE - band) // 2
    assert square[: top - 2].max() == 0
    assert square[top + 2 : top + band - 2].mean() == pytest.approx(picture.mean(), abs=0.02)


def test_an_empty_scan_gives_a_flat_picture() -> None:
    square = square_projection(scan(np.full((10, 10, 10), -1000.0, dtype=np.float32))).numpy()
    assert np.isfinite(square).all()
    assert np.ptp(square) == 0


@pytest.mark.parametrize("name", ["lung2.nrrd", "lidc_idri_0001.nii.gz", "tcga_34_2605_dicom"])
def test_a_real_scan_looks_like_a_film(real_mini: Path, name: str) -> None:
    volume = read_volume(real_mini / "ct" / name)
    square, picture = square_projection(volume).numpy(), frontal_projection(volume)
    third = SIDE // 3
    spine = square[third : 2 * third, SIDE // 2 - 12 : SIDE // 2 + 12].mean()
    lungs = [square[third : 2 * third, at : at + 20].mean() for at in (SIDE // 4, 3 * SIDE // 4 - 20)]
    assert spine > 0.55
    assert max(lungs) < spine - 0.2
    columns = picture.shape[1]
    assert picture[-10:, columns // 3 : 2 * columns // 3].mean() > 0.6  # the abdomen, below
