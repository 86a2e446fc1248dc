"""The seven real scans beside the checkout: they read, with the spacing that their source states, the right way round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ctx_distill.data.io.radiograph import read_radiograph
from ctx_distill.data.io.volume import read_volume
from ctx_distill.data.manifests.index_rows import leave_out_for_index
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.data.transforms.model_volume import VolumeSpec, prepare_volume

REAL = Path(__file__).parents[3].parent / "shared/data/real_mini"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL}")

# (z, y, x) voxels and mm, out of SOURCES.md and the headers as other programs print them
EXPECTED = {
    "lidc_idri_0001.nii.gz": ((133, 512, 512), (2.5, 0.703, 0.703)),
    "lung1.nrrd": ((48, 512, 512), (5.0, 0.570, 0.570)),
    "lung2.nrrd": ((61, 512, 512), (5.0, 0.627, 0.627)),
    "lung_dx_a0001.nii.gz": ((64, 512, 512), (5.0, 0.842, 0.842)),
    "totalseg_aortic_dissection.nii.gz": ((191, 167, 233), (1.5, 1.5, 1.5)),
    "tcga_34_2605_dicom": ((61, 512, 512), (5.0, 0.781, 0.781)),
    "elastix_right_lung_crop.mha": ((129, 157, 115), (2.5, 1.366, 1.366)),
}
# The lost volume of this one's right lung outweighs the heart (its report in ct.csv).
DISEASED = {"tcga_34_2605_dicom"}
# Heart and aorta as bright as bone over most slices.
CONTRAST = {"totalseg_aortic_dissection.nii.gz"}


@pytest.mark.parametrize("name", EXPECTED)
def test_reads_with_its_spacing_and_the_right_way_round(name: str) -> None:
    volume = read_volume(REAL / "ct" / name)
    shape, spacing = EXPECTED[name]
    assert volume.voxels.shape == shape
    assert volume.spacing == pytest.approx(spacing, abs=1e-3)
    out = prepare_volume(volume, VolumeSpec((4, 3, 3), (80, 128, 128), output_range=(-1000, 1000)))[0].numpy()
    if name.startswith("elastix"):
        return  # a crop of one lung has no other side to compare with
    body = np.argwhere(out > -200)
    low, high = np.percentile(body[:, 0], (0.5, 99.5))
    row, column = int(np.median(body[:, 1])), int(np.median(body[:, 2]))
    # Trachea: the air near the body's middle line is in the upper quarter of the slices, and hardly in the lowest.
    air = (out < -850)[:, row - 14 : row + 14, column - 8 : column + 8].sum((1, 2))
    quarter = (high - low) / 4
    assert air[int(high - quarter) : int(high)].sum() > 1.5 * air[int(low) : int(low + quarter)].sum()
    # Spine: row 0 is anterior, and what holds bone in the most slices lies in the body's back half.
    if name not in CONTRAST:
        covered = (out[:, :, 44:84] > 250).any(axis=2).sum(axis=0)
        assert covered.argmax() > np.median(body[:, 1])
    # Heart: below the middle of the lungs there is less lung on the patient's left, the right half of the picture.
    lung = ((out > -950) & (out < -700))[:, 30:98, 20:108]
    middle = int((lung.sum((1, 2)) * np.arange(80)).sum() / lung.sum())
    if name not in DISEASED:
        below = lung[middle - 12 : middle]
        assert below[:, :, :44].sum() > 1.2 * below[:, :, 44:].sum()


def test_the_manifests_and_films_read() -> None:
    ct, xray = read_manifest(REAL / "ct.csv"), read_manifest(REAL / "xray.csv")
    assert (len(ct), len(xray)) == (7, 26)
    kept, counts = leave_out_for_index(xray, ct)
    assert len(kept) == 26
    assert sum(counts.values()) == 0
    for row in xray.frame.index[::5]:
        image = read_radiograph(xray.image_file(row))
        assert min(image.shape) > 200
        assert image.std() > 0.02
        assert image.min() >= 0
        assert image.max() <= 1
