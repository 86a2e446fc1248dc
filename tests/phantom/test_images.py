"""The truth is in the pictures: the same person with and without a finding, sides, and the film's orientation."""

from __future__ import annotations

import io

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from ctx_distill.phantom.anatomy import Person, sample_person
from ctx_distill.phantom.canvas import Canvas, Grid
from ctx_distill.phantom.ct_scan import nifti_bytes
from ctx_distill.phantom.film import radiograph
from ctx_distill.phantom.lesions import paint_chest
from ctx_distill.phantom.planted_findings import FINDINGS, PlantedFinding, draw_finding

GRID = Grid((64, 72, 72), (4.6, 5.0, 5.0), (-8, 0, 0))


@pytest.fixture(scope="module")
def person() -> Person:
    return sample_person(np.random.default_rng(11))


@pytest.fixture(scope="module")
def healthy(person: Person) -> Canvas:
    canvas = Canvas(GRID)
    paint_chest(canvas, person, [], upright=False)
    return canvas


def planted(name: str, side: str, extent: float = 0.6) -> PlantedFinding:
    drawn = draw_finding(name, np.random.default_rng(3))
    return PlantedFinding(name, side, drawn.place, extent, drawn.size, drawn.seed)  # type: ignore[arg-type]


def scan(person: Person, finding: PlantedFinding) -> NDArray[np.float32]:
    canvas = Canvas(GRID)
    paint_chest(canvas, person, [finding], upright=False)
    return canvas.hu


@pytest.mark.parametrize("name", FINDINGS)
def test_a_finding_changes_its_part_of_the_scan(name: str, person: Person, healthy: Canvas) -> None:
    finding = draw_finding(name, np.random.default_rng(3))
    change = np.abs(scan(person, finding) - healthy.hu)
    assert (change > 50).sum() > 25  # of voxels of 115 mm3
    assert (change > 50).mean() < 0.25


def test_the_chest_has_realistic_densities(healthy: Canvas, person: Person) -> None:
    hu, lung = healthy.hu, healthy.lung > 0.99
    assert -920 < np.median(hu[lung]) < -780
    litres = healthy.lung.sum() * np.prod(GRID.spacing) / 1e6
    assert 3 < litres < 8
    assert 300 < np.percentile(hu, 99.7) < 1200
    right, left = healthy.lung[:, :, :36].sum(), healthy.lung[:, :, 36:].sum()
    assert right > left  # the heart takes room on the left


@pytest.mark.parametrize(
    ("name", "sign"),
    [("pleural effusion", 1), ("consolidation", 1), ("lung mass", 1), ("atelectasis", 1), ("pneumothorax", -1)],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_side_of_the_report_is_the_side_of_the_scan(
    name: str, sign: int, side: str, person: Person, healthy: Canvas
) -> None:
    change = (scan(person, planted(name, side)) - healthy.hu) * (healthy.lung > 0.5)
    halves = {"right": change[:, :, :36], "left": change[:, :, 36:]}  # x grows to the patient's left
    other = {"left": "right", "right": "left"}[side]
    on_side = halves[side] if sign > 0 else np.minimum(halves[side], 0)
    assert sign * on_side.sum() > 2e4
    assert np.abs(halves[side]).sum() > 20 * np.abs(halves[other]).sum()


def test_effusion_fills_the_back_of_the_base(person: Person, healthy: Canvas) -> None:
    rise = (scan(person, planted("pleural effusion", "left", 0.8)) - healthy.hu) * (healthy.lung > 0.5)
    low, high = slice(10, 26), slice(44, 60)
    assert rise[low, 40:, 36:].mean() > 40
    assert rise[low, 40:, 36:].sum() > 5 * np.abs(rise[low, :32, 36:]).sum()
    assert rise[low].sum() > 5 * np.abs(rise[high]).sum()


def film(person: Person, findings: list[PlantedFinding]) -> NDArray[np.float64]:
    pictures = [radiograph(person, findings, np.random.default_rng(seed)) for seed in (0, 1)]
    width = min(picture.shape[1] for picture in pictures)
    cut = [p[:, (p.shape[1] - width) // 2 :][:, :width] for p in pictures]
    return np.mean(np.stack(cut), axis=0)


def test_film_is_upright_with_the_right_side_on_the_left(person: Person) -> None:
    picture = film(person, [])
    assert picture.shape[0] == 160
    rows, columns = picture.shape
    third = slice(int(0.5 * rows), int(0.68 * rows))
    middle = columns // 2
    # the heart's apex: the lower lung field is whiter on the right of the picture, the patient's left
    right_lung = picture[third, int(0.22 * columns) : int(0.36 * columns)].mean()
    left_heart = picture[third, columns - int(0.36 * columns) : columns - int(0.22 * columns)].mean()
    assert left_heart > right_lung + 8
    # upright: the abdomen is white, the air above the shoulders black
    assert picture[-30:-10, middle - 30 : middle + 30].mean() > 150
    assert picture[6:14, 6:24].mean() < 40
    # bone is white, lung dark
    assert picture[: rows // 2, middle - 4 : middle + 4].mean() > 2 * picture[50:90, middle - 45 : middle - 30].mean()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["pleural effusion", "consolidation", "lung mass"])
def test_side_of_the_report_is_the_side_of_the_film(name: str, side: str, person: Person) -> None:
    change = film(person, [planted(name, side, 0.7)]) - film(person, [])
    middle = change.shape[1] // 2
    halves = {"right": change[:, :middle].clip(12).sum(), "left": change[:, middle:].clip(12).sum()}
    other = {"left": "right", "right": "left"}[side]
    floor = 12 * change[:, :middle].size
    assert halves[side] - floor > 4 * max(halves[other] - floor, 1)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LAS", "SRA"])
def test_stored_orientation_keeps_the_world(codes: str) -> None:
    grid = Grid((6, 5, 4), (3.0, 2.0, 1.5))
    volume = np.arange(120, dtype=np.int16).reshape(grid.shape)
    content = nifti_bytes(volume, grid, codes)
    assert content == nifti_bytes(volume, grid, codes)
    import gzip

    image = nib.Nifti1Image.from_stream(io.BytesIO(gzip.decompress(content)))
    assert "".join(nib.aff2axcodes(image.affine)) == codes
    canonical = nib.as_closest_canonical(image)
    assert canonical.header.get_zooms() == pytest.approx((1.5, 2.0, 3.0))
    assert image.get_data_dtype() == np.int16
    back = np.asarray(canonical.dataobj)[::-1, ::-1].transpose(2, 1, 0)
    assert np.array_equal(back, volume)
    # the middle of the grid is the middle of the world
    assert canonical.affine @ [1.5, 2.0, 2.5, 1] == pytest.approx([0, 0, 0, 1], abs=1e-5)
