"""Each named preset against its project's definition, written down here a second time with that project's own tools."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from monai.transforms import (
    CenterSpatialCrop,
    Compose,
    EnsureChannelFirst,
    LoadImage,
    Orientation,
    ScaleIntensityRange,
    Spacing,
    SpatialPad,
)

from ctx_distill.commands.main import main
from ctx_distill.data.loading.prepared import PreparedFolder
from ctx_distill.data.transforms.model_volume import VolumeSpec, load_ct
from ctx_distill.data.transforms.volume_presets import VOLUME_PRESETS
from ctx_distill.runs.prepare_volumes import preset_volume


def scan(path: Path, size: tuple[int, int, int], spacing: tuple[float, float, float], axes: str) -> Path:
    """A NIfTI of smooth noise whose file axes (i, j, k) point along `axes`."""
    rng = np.random.default_rng(7)
    coarse = torch.tensor(rng.uniform(-1400, 700, size=tuple(n // 4 + 2 for n in size)))[None, None]
    hu = F.interpolate(coarse, size=size, mode="trilinear")[0, 0].numpy().round().astype(np.int16)
    signs = {"L": (0, -1), "R": (0, 1), "P": (1, -1), "A": (1, 1), "S": (2, 1), "I": (2, -1)}
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, letter in enumerate(axes):
        row, sign = signs[letter]
        affine[row, column] = sign * spacing[column]
    nib.Nifti1Image(hu, affine).to_filename(path)
    return path


def crop_or_pad(array: torch.Tensor, shape: tuple[int, ...], value: float) -> torch.Tensor:
    """Middle crop, then middle pad, of (D, H, W)."""
    for axis, size in enumerate(shape):
        surplus = array.shape[axis] - size
        if surplus > 0:
            array = array.narrow(axis, surplus // 2, size)
    pads = [
        n
        for axis in (2, 1, 0)
        for n in ((shape[axis] - array.shape[axis]) // 2, -(-(shape[axis] - array.shape[axis]) // 2))
    ]
    return F.pad(array, pads, value=value)


@pytest.mark.parametrize("axes", ["LPS", "RAS", "LPI"])
def test_ct_clip(tmp_path: Path, axes: str) -> None:
    path = scan(tmp_path / "a.nii.gz", (48, 40, 32), (0.9375, 0.9375, 3.0), axes)
    data = torch.tensor(nib.load(path).get_fdata().transpose(2, 0, 1))[None, None].float()
    resized = F.interpolate(data, size=(64, 60, 50), mode="trilinear", align_corners=False)[0, 0]
    theirs = crop_or_pad(resized.clamp(-1000, 1000) / 1000, (240, 480, 480), -1.0)
    ours = load_ct(path, VOLUME_PRESETS["ct-clip"])
    assert ours.shape == (1, 240, 480, 480)
    assert float((ours[0] - theirs).abs().max()) < 1e-4
    assert float(ours.std()) > 0.01


@pytest.mark.parametrize("axes", ["LPS", "RAS"])
@pytest.mark.parametrize(("name", "shape"), [("hlip", (112, 336, 336)), ("fvlm", (112, 256, 352))])
def test_hlip_and_fvlm(tmp_path: Path, axes: str, name: str, shape: tuple[int, int, int]) -> None:
    path = scan(tmp_path / "a.nii.gz", (296, 272, 24), (1.25, 1.25, 6.0), axes)
    image = sitk.ReadImage(str(path))
    if name == "fvlm":
        image = sitk.DICOMOrient(image, "LPS")
    data = torch.tensor(sitk.GetArrayFromImage(image))[None, None].float()
    resized = F.interpolate(data, size=(48, 340, 370), mode="trilinear", align_corners=False)[0, 0]
    theirs = crop_or_pad(((resized + 1150) / 1500).clamp(0, 1), shape, 0.0)
    ours = load_ct(path, VOLUME_PRESETS[name])
    assert ours.shape == (1, *shape)
    assert float((ours[0] - theirs).abs().max()) < 1e-4


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SPL"])
def test_merlin(tmp_path: Path, axes: str) -> None:
    size, spacing = (61, 51, 24), (0.9, 0.9, 3.0)
    order = {"L": 0, "R": 0, "P": 1, "A": 1, "S": 2}
    path = scan(
        tmp_path / "a.nii.gz",
        tuple(size[order[letter]] for letter in axes),  # type: ignore[arg-type]
        tuple(spacing[order[letter]] for letter in axes),  # type: ignore[arg-type]
        axes,
    )
    chain = Compose(
        [
            LoadImage(image_only=True),
            EnsureChannelFirst(),
            Orientation(axcodes="RAS"),
            Spacing(pixdim=(1.5, 1.5, 3), mode="bilinear", dtype=np.float64),
            ScaleIntensityRange(a_min=-1000, a_max=1000, b_min=0.0, b_max=1.0, clip=True),
            SpatialPad(spatial_size=[224, 224, 160]),
            CenterSpatialCrop(roi_size=[224, 224, 160]),
        ]
    )
    theirs = np.asarray(chain(path))[0].transpose(2, 1, 0)
    ours = load_ct(path, VOLUME_PRESETS["merlin"])[0].numpy()
    # MONAI sets an odd number of voxels one end off the middle of an even tensor: the same in a tensor of odd sides
    odd = load_ct(path, dataclasses.replace(VOLUME_PRESETS["merlin"], shape=(160, 223, 223)))[0].numpy()
    assert ours.shape == theirs.shape == (160, 224, 224)
    assert np.abs(odd - theirs[:, 1:, 1:]).max() < 1e-4 or np.abs(odd - theirs[:, :-1, :-1]).max() < 1e-4
    assert odd.std() > 0.01


def test_they_can_be_prepared_by_name(cohort: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "data"
    manifest.mkdir()
    lines = (cohort / "ct.csv").read_text().splitlines()
    (manifest / "ct.csv").write_text("\n".join(lines[:2]) + "\n")
    folder = manifest / "out"
    shutil.copytree(cohort / "ct", manifest / "ct")
    assert main(["prepare", str(manifest / "ct.csv"), str(folder), "--preset", "hlip", "--workers", "1"]) == 0
    assert PreparedFolder.standing(folder).spec == preset_volume("hlip")[0]
    for name in ("ct-clip", "fvlm", "hlip", "merlin", "demo", "base", "large"):
        assert preset_volume(name)[0].stored == "int16"


def test_what_came_later_leaves_older_fingerprints_alone() -> None:
    spec = VolumeSpec((1.0, 1.0, 1.0), (8, 8, 8))
    assert set(spec.to_config()) == {"spacing", "shape", "window", "output_range", "orientation", "antialias"}
    assert VolumeSpec.from_config(VOLUME_PRESETS["hlip"].to_config()) == VOLUME_PRESETS["hlip"]
