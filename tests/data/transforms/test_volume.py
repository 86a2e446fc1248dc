"""Geometry against a formula: a smooth lopsided body is known at every millimetre, so each scan of it can be computed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from numpy.typing import NDArray

from ctx_distill.data.io.volume import Volume
from ctx_distill.data.transforms.model_volume import AIR_HU, VolumeSpec, load_ct, prepare_volume, target_affine
from ctx_distill.data.transforms.resample import resample
from ctx_distill.types import InputError

Array = NDArray[np.float64]
VECTORS = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
CODES = ["".join(p) for axes in itertools.permutations(("LR", "PA", "SI")) for p in itertools.product(*axes)]
CENTRE = np.array([12.0, -30.0, 200.0])
# (left, posterior, superior) mm from the centre, width mm, HU above -800: different in every direction.
BLOBS = [((14, 0, 0), 9, 900), ((0, 16, 4), 7, 600), ((-6, -5, 18), 8, 1200), ((-15, 9, -12), 10, 500)]


def body(points: Array) -> Array:
    """(..., 3) LPS mm -> HU."""
    offset = points - CENTRE
    return -800 + sum(h * np.exp(-0.5 * ((offset - np.array(c)) ** 2).sum(-1) / w**2) for c, w, h in BLOBS)


def points_of(affine: Array, shape: tuple[int, ...]) -> Array:
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def centred(axes: Array, shape: tuple[int, ...]) -> Array:
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = CENTRE - axes @ ((np.array(shape) - 1) / 2)
    return affine


def scan(axes: Array, shape: tuple[int, int, int]) -> Volume:
    """The body as a scanner with these axis steps (columns, mm) would store it."""
    affine = centred(axes, shape)
    return Volume(body(points_of(affine, shape)).astype(np.float32), affine, Path("body"))


def rotation(degrees: tuple[float, float, float]) -> Array:
    a, b, c = np.radians(degrees)
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return np.asarray(x @ y @ z)


HU = {"window": (-1000.0, 1000.0), "output_range": (-1000.0, 1000.0)}  # the window leaves HU as they are
SPEC = VolumeSpec(spacing=(2.5, 2.0, 1.5), shape=(20, 24, 28), **HU)
TARGET = centred(np.array([[0, 0, 1.5], [0, 2.0, 0], [2.5, 0, 0]]), SPEC.shape)
# HU. The sharpest peak bends by 1200 / 8^2 HU / mm^2. Linear interpolation errs by step^2 f'' / 8 along each axis (14 HU
# at steps of 1.6, 1.4, 1.2 mm), and smoothing before a reduction from 1.2 to 2.5 mm by sigma^2 f'' / 2 (8 HU).
TOLERANCE = 25.0


def truth() -> Array:
    return body(points_of(TARGET, SPEC.shape))


@pytest.mark.parametrize("code", CODES)
def test_each_of_the_48_axis_orders_comes_out_the_same(code: str) -> None:
    axes = np.stack([np.array(VECTORS[letter]) * mm for letter, mm in zip(code, (1.6, 1.4, 1.2))], axis=1)
    # Over 90 mm along each axis, so that the target lies inside whichever way the scan is turned.
    out = prepare_volume(scan(axes, (58, 66, 78)), SPEC)[0].numpy()
    assert np.abs(out - truth()).max() < TOLERANCE
    # A shift of half a voxel would already show.
    assert np.abs(truth() - body(points_of(TARGET, SPEC.shape) + np.array([0, 0, 0.7]))).max() > 1.5 * TOLERANCE
    # The body itself tells directions apart: mirrored along any axis it is far from the truth.
    for axis in range(3):
        assert np.abs(np.flip(out, axis) - truth()).max() > 300


def test_there_are_48_orders() -> None:
    assert len(set(CODES)) == 48


@pytest.mark.parametrize("degrees", [(0, 0, 8), (12, -7, 25), (45, 30, -60)])
def test_an_oblique_scan_comes_out_the_same(degrees: tuple[float, float, float]) -> None:
    out = prepare_volume(scan(rotation(degrees) * 1.3, (84, 84, 84)), SPEC)[0].numpy()
    assert np.abs(out - truth()).max() < TOLERANCE


def test_a_tilted_gantry_comes_out_the_same() -> None:
    axes = np.array([[0, 0, 1.4], [0.35 * 2.0, 1.4, 0], [2.0, 0, 0]])  # each slice 0.7 mm further back than the last
    out = prepare_volume(scan(axes, (50, 80, 70)), SPEC)[0].numpy()
    assert np.abs(out - truth()).max() < TOLERANCE


@pytest.mark.parametrize("code", ["LPS", "RAS", "LAI", "SPL", "AIR"])
def test_the_output_orientation_is_a_value_of_the_spec(code: str) -> None:
    spec = VolumeSpec(spacing=(2.0, 2.0, 2.0), shape=(22, 20, 24), orientation=code, **HU)
    out = prepare_volume(scan(np.diag([1.3, 1.3, 1.3]), (70, 70, 70)), spec)[0].numpy()
    w, h, d = (np.array(VECTORS[letter]) * 2.0 for letter in code)
    expected = body(points_of(centred(np.stack([d, h, w], axis=1), spec.shape), spec.shape))
    assert np.abs(out - expected).max() < TOLERANCE


def test_left_stays_left_and_feet_come_first() -> None:
    voxels = np.full((40, 40, 40), -1000, dtype=np.int16)
    affine = centred(np.array([[0, 0, -2.0], [0, -2.0, 0], [-2.0, 0, 0]]), voxels.shape)  # stored as (I, A, R)
    for place, value in (((25, 0, 0), 100), ((0, 25, 0), 200), ((0, 0, 25), 300)):
        index = np.linalg.inv(affine) @ np.append(CENTRE + place, 1.0)
        k = index[:3].round().astype(int)
        voxels[k[0] - 2 : k[0] + 3, k[1] - 2 : k[1] + 3, k[2] - 2 : k[2] + 3] = value
    out = prepare_volume(Volume(voxels, affine, Path("x")), VolumeSpec((2, 2, 2), (40, 40, 40), **HU))[0]
    for value, axis in ((100, 2), (200, 1), (300, 0)):  # left: W grows; posterior: H grows; superior: D grows
        where = (out - value).abs().lt(5).nonzero().double().mean(dim=0)
        expected = torch.full((3,), 19.5, dtype=torch.float64)
        expected[axis] += 12.5
        assert (where - expected).abs().max() < 1.0


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("turn", [0.0, 20.0])
def test_a_sphere_in_5_mm_slices_keeps_its_extent(antialias: bool, turn: float) -> None:
    axes = rotation((0, 0, turn)) @ np.array([[0, 0, 0.7], [0, 0.7, 0], [5.0, 0, 0]])
    affine = centred(axes, (24, 170, 170))
    radius = np.linalg.norm(points_of(affine, (24, 170, 170)) - CENTRE, axis=-1)
    voxels = np.where(radius < 20, 1000, -1000).astype(np.int16)
    spec = VolumeSpec((1.5, 2.0, 1.0), (50, 40, 76), antialias=antialias, **HU)
    out = prepare_volume(Volume(voxels, affine, Path("x")), spec)[0]
    for axis, mm in enumerate(spec.spacing):
        line = out[tuple(slice(None) if a == axis else slice(n // 2, n // 2 + 1) for a, n in enumerate(out.shape))]
        extent = float(((line.flatten() + 1000) / 2000).sum()) * mm  # the integral does not depend on the blur
        assert extent == pytest.approx(40, abs=5.0 if axis == 0 else 1.5)


def itk_resample(volume: Volume, spec: VolumeSpec) -> Array:
    """SimpleITK's own linear resample: another implementation, another index order."""

    def geometry(affine: Array) -> tuple[list[float], list[float], list[float]]:
        columns = affine[:3, [2, 1, 0]]
        spacing = np.linalg.norm(columns, axis=0)
        return affine[:3, 3].tolist(), spacing.tolist(), (columns / spacing).flatten().tolist()

    image = sitk.GetImageFromArray(volume.voxels.astype(np.float32))
    for setter, value in zip((image.SetOrigin, image.SetSpacing, image.SetDirection), geometry(volume.affine_lps)):
        setter(value)
    origin, spacing, direction = geometry(target_affine(volume, spec))
    out = sitk.Resample(
        image, list(spec.shape[::-1]), sitk.Transform(), sitk.sitkLinear, origin, spacing, direction, AIR_HU
    )
    return np.asarray(sitk.GetArrayFromImage(out))


@pytest.mark.parametrize("degrees", [(0, 0, 0), (0, 0, 90), (10, 5, -15)])
@pytest.mark.parametrize("slices", [9, 61])
def test_agrees_with_simpleitk(degrees: tuple[float, float, float], slices: int) -> None:
    """Random voxels: any slip of a voxel or an axis shows. 9 slices are enlarged, 61 reduced."""
    rng = np.random.default_rng(7)
    axes = rotation(degrees).round(12) @ np.array([[0, 0, 0.8], [0, -0.8, 0], [60 / slices, 0, 0]])
    shape = (slices, 50, 64)
    volume = Volume(rng.integers(-1000, 1000, shape, dtype=np.int16), centred(axes, shape), Path("x"))
    spec = VolumeSpec((2.0, 1.1, 0.9), (40, 50, 60), window=(-2000, 2000), output_range=(-2000, 2000), antialias=False)
    ours, theirs = prepare_volume(volume, spec)[0].numpy(), itk_resample(volume, spec)
    inside = (theirs != AIR_HU) & (ours != AIR_HU)
    assert inside.mean() > 0.4
    assert np.abs(ours - theirs)[inside].max() < 0.2  # HU, of 2000: single precision
    # Where one sees scan and the other air lies on the scan's rim.
    assert ((theirs != AIR_HU) != (ours != AIR_HU)).mean() < 0.01


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("step", [(0.4, 1.2, 1.0), (3.1, 2.2, 1.9)])
def test_both_ways_of_resampling_agree(antialias: bool, step: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(3)
    voxels = rng.integers(-1000, 1000, (31, 42, 37), dtype=np.int16)
    matrix = np.zeros((4, 4))
    matrix[0, 2], matrix[1, 0], matrix[2, 1], matrix[3, 3] = -step[0], step[1], step[2], 1.0  # permuted and flipped
    matrix[:3, 3] = 29.3, 2.2, -1.7
    ways = [
        resample(voxels, matrix, (17, 19, 23), outside=AIR_HU, antialias=antialias, separable=way)
        for way in (True, False)
    ]
    assert (ways[0] - ways[1]).abs().max() < 0.1
    assert ((ways[0] == AIR_HU) == (ways[1] == AIR_HU)).all()


def test_antialiasing_removes_what_the_grid_cannot_hold_and_keeps_the_rest() -> None:
    x = np.arange(120)
    stripes = np.broadcast_to(np.where(x % 3 == 0, 900, -600), (12, 12, 120)).astype(np.float32).copy()  # mean -100
    affine = np.eye(4)[[2, 1, 0, 3]]
    volume = Volume(stripes, affine, Path("x"))
    off, on = (
        prepare_volume(volume, VolumeSpec((1, 1, 4), (6, 6, 24), antialias=aa, **HU))[0, 3, 3, 4:-4]
        for aa in (False, True)
    )
    assert off.std() > 300  # beats between the stripes and the grid
    assert (on + 100).abs().max() < 60
    flat = Volume(np.full((12, 12, 120), 77, dtype=np.int16), affine, Path("x"))
    assert torch.allclose(prepare_volume(flat, VolumeSpec((1, 1, 4), (6, 6, 24), **HU)), torch.tensor(77.0), atol=1e-3)


def test_a_mild_reduction_is_not_smoothed() -> None:
    rng = np.random.default_rng(0)
    volume = Volume(rng.normal(0, 300, (30, 30, 30)).astype(np.float32), np.eye(4), Path("x"))
    pair = [prepare_volume(volume, VolumeSpec((1.5, 1.5, 1.5), (16, 16, 16), antialias=aa)) for aa in (False, True)]
    assert torch.equal(*pair)


def test_a_small_scan_is_centred_in_air() -> None:
    volume = Volume(np.full((10, 12, 14), 50, dtype=np.int16), np.eye(4)[[2, 1, 0, 3]], Path("x"))
    out = prepare_volume(volume, VolumeSpec((1, 1, 1), (20, 20, 20), window=(-1000, 1000)))
    assert out.shape == (1, 20, 20, 20)
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    inside = torch.zeros(20, 20, 20, dtype=torch.bool)
    inside[5:15, 4:16, 3:17] = True
    assert torch.allclose(out[0][inside], torch.tensor(0.05))
    assert torch.all(out[0][~inside] == -1.0)


def test_a_large_scan_is_cropped_around_its_centre() -> None:
    ramp = np.broadcast_to(np.arange(41, dtype=np.int16)[:, None, None], (41, 9, 9)).copy()
    out = prepare_volume(Volume(ramp, np.eye(4)[[2, 1, 0, 3]], Path("x")), VolumeSpec((1, 1, 1), (5, 3, 3), **HU))
    assert out[0, :, 1, 1].tolist() == pytest.approx([18, 19, 20, 21, 22], abs=1e-3)


def test_window_and_range() -> None:
    voxels = np.stack([np.full((4, 4), hu) for hu in (-2000, -160, 40, 240, 3000)]).astype(np.int16)
    spec = VolumeSpec((1, 1, 1), (5, 2, 2), window=(-160, 240), output_range=(0, 1))
    out = prepare_volume(Volume(voxels, np.eye(4)[[2, 1, 0, 3]], Path("x")), spec)
    assert out[0, :, 0, 0].tolist() == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-6)


def test_the_source_is_left_as_it_was() -> None:
    volume = scan(np.eye(3), (20, 20, 20))
    before = volume.voxels.copy()
    prepare_volume(volume, SPEC)
    np.testing.assert_array_equal(volume.voxels, before)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"spacing": [1, 1]}, "spacing"),
        ({"spacing": [1, 0, 1]}, "spacing"),
        ({"spacing": [1, float("nan"), 1]}, "spacing"),
        ({"shape": [8, 8.5, 8]}, "shape"),
        ({"shape": [8, 0, 8]}, "shape"),
        ({"shape": [100000, 100000, 100000]}, "shape"),
        ({"window": [400, -400]}, "window"),
        ({"output_range": [1, 1]}, "output_range"),
        ({"orientation": "LRS"}, "orientation"),
        ({"orientation": "LP"}, "orientation"),
        ({"antialias": "yes"}, "antialias"),
        ({"spacign": [1, 1, 1]}, "spacign"),
    ],
)
def test_a_wrong_spec_is_refused_by_name(change: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word):
        VolumeSpec.from_config({"spacing": [1, 1, 1], "shape": [8, 8, 8], **change})


def test_a_spec_survives_json_and_its_fingerprint_follows_every_value() -> None:
    spec = VolumeSpec(spacing=[3, 1.5, 1.5], shape=[96, 192, 192], orientation="ras")  # type: ignore[arg-type]
    assert spec.shape == (96, 192, 192)
    assert spec.orientation == "RAS"
    again = VolumeSpec.from_config(json.loads(json.dumps(spec.to_config())))
    assert again == spec
    assert again.fingerprint() == spec.fingerprint()
    changes = [
        {"spacing": [3, 1.5, 1.6]}, {"shape": [96, 192, 191]}, {"window": [-1000, 999]}, {"output_range": [0, 1]},
        {"orientation": "LPS"}, {"antialias": False},
    ]  # fmt: skip
    prints = {VolumeSpec.from_config({**spec.to_config(), **c}).fingerprint() for c in changes} | {spec.fingerprint()}
    assert len(prints) == len(changes) + 1


def test_load_ct_reads_and_prepares(tmp_path: Path) -> None:
    volume = scan(np.array([[0, 0, 1.5], [0, 1.5, 0], [1.5, 0, 0]]), (60, 60, 60))
    image = sitk.GetImageFromArray(volume.voxels)
    image.SetSpacing([1.5] * 3)
    image.SetOrigin(volume.affine_lps[:3, 3].tolist())
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    assert torch.equal(load_ct(tmp_path / "a.nrrd", SPEC), prepare_volume(volume, SPEC))
