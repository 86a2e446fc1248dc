"""The raw path against MONAI's five transforms, where both define the same grid.

MONAI puts the first voxels on each other and crops around the middle voxel; here the scan's centre is kept. The two agree
where the scan's extent is a whole number of target steps and both sizes are odd.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Compose, LoadImage, Orientation, ResizeWithPadOrCrop, ScaleIntensityRange, Spacing

from ctx_distill.data.transforms.model_volume import VolumeSpec, load_ct


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "SPL"])
@pytest.mark.parametrize(("slope", "inter"), [(1.0, 0.0), (1.0, -1024.0), (0.5, -3.5)])
def test_agrees_with_monai(tmp_path: Path, axes: str, slope: float, inter: float) -> None:
    rng = np.random.default_rng(3)
    hu = rng.uniform(-900, 900, size=(31, 37, 25))
    stored = np.round((hu - inter) / slope).astype(np.int16)
    start = nib.orientations.axcodes2ornt("RAS")
    turned = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(axes))
    image = nib.Nifti1Image(stored, np.eye(4)).as_reoriented(turned)
    image = nib.Nifti1Image(np.asarray(image.dataobj).astype(np.int16), image.affine)
    image.header.set_slope_inter(slope, inter)
    path = tmp_path / "a.nii.gz"
    nib.save(image, path)
    chain = Compose(
        [
            LoadImage(image_only=True, ensure_channel_first=True),
            Orientation(axcodes="RAS"),
            Spacing(pixdim=(1.5, 1.5, 1.5), mode="bilinear", padding_mode="border", dtype=np.float64),
            ScaleIntensityRange(-1000.0, 1000.0, -1.0, 1.0, clip=True),
            ResizeWithPadOrCrop((15, 21, 13), constant_values=-1.0),
        ]
    )
    theirs = np.asarray(chain(path))[0].transpose(2, 1, 0)
    ours = load_ct(path, VolumeSpec((1.5, 1.5, 1.5), (13, 21, 15), (-1000.0, 1000.0), orientation="RAS"))[0].numpy()
    assert ours.std() > 0.1
    assert np.abs(ours - theirs).max() < 1e-5
