"""Volume specs of other projects by name, so that their models can be compared on the same files.

Sources: CT-CLIP (Hamamci et al. 2024, `data_inference.py`), fVLM (Shui et al. 2025), HLIP (Zhao et al. 2025, `process.py` and
`data_ct_rate.py`), Merlin (Blankemeier et al. 2024, `dataloaders`). Each resamples without anti-aliasing and pads with the min
value of its window. They round the size of the resampled array, which changes the spacing by less than a voxel over the
scan; here the spacing is exact. If no rounding occurs, the tensors are equal.

Merlin's tensor is (x, y, z); here it is (z, y, x). CT-CLIP and HLIP do not reorient and use the file's axes.
Normalisation by ImageNet's mean and standard deviation, as in HLIP, is left to the model.
"""

from __future__ import annotations

from collections.abc import Mapping

from ctx_distill.data.transforms.model_volume import VolumeSpec

VOLUME_PRESETS: Mapping[str, VolumeSpec] = {
    "ct-clip": VolumeSpec(
        spacing=(1.5, 0.75, 0.75), shape=(240, 480, 480), window=(-1000.0, 1000.0), output_range=(-1.0, 1.0),
        orientation="KIJ", antialias=False, outside=-1000.0,
    ),
    "fvlm": VolumeSpec(
        spacing=(3.0, 1.0, 1.0), shape=(112, 256, 352), window=(-1150.0, 350.0), output_range=(0.0, 1.0),
        orientation="LPS", antialias=False, outside=-1150.0,
    ),
    "hlip": VolumeSpec(
        spacing=(3.0, 1.0, 1.0), shape=(112, 336, 336), window=(-1150.0, 350.0), output_range=(0.0, 1.0),
        orientation="KJI", antialias=False, outside=-1150.0,
    ),
    "merlin": VolumeSpec(
        spacing=(3.0, 1.5, 1.5), shape=(160, 224, 224), window=(-1000.0, 1000.0), output_range=(0.0, 1.0),
        orientation="RAS", antialias=False, outside=-1000.0,
    ),
}  # fmt: skip
