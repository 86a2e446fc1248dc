"""How MONAI, TorchIO and SimpleITK bring a CT to the grid of `make bench-data`."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPACING, SHAPE, WINDOW = (3.0, 1.5, 1.5), (96, 192, 192), (-1000.0, 1000.0)


def simpleitk() -> Callable[[Path], Any]:
    """Read, one linear resample onto the target grid, window."""
    import numpy as np
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)

    def load(path: Path) -> Any:
        series = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path)) if path.is_dir() else str(path)
        image = sitk.ReadImage(series)
        centre = np.array(image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()]))
        size, spacing = np.array(SHAPE[::-1]), np.array(SPACING[::-1])
        origin = centre - spacing * (size - 1) / 2
        resampled = sitk.Resample(image, [int(n) for n in size], sitk.Transform(), sitk.sitkLinear, origin.tolist(),
                                  spacing.tolist(), np.eye(3).ravel().tolist(), -1024.0, sitk.sitkFloat32)  # fmt: skip
        low, high = WINDOW
        return np.clip(sitk.GetArrayViewFromImage(resampled), low, high) / high

    return load


def monai_chain(lazy: bool) -> Any:
    """MONAI's usual five transforms, on tensors throughout."""
    from monai.transforms import Compose, LoadImage, Orientation, ResizeWithPadOrCrop, ScaleIntensityRange, Spacing

    # ResizeWithPadOrCrop before the window, as lazy execution wants the spatial ones together; what it pads is air.
    return Compose(
        [
            LoadImage(image_only=True, ensure_channel_first=True),
            Orientation(axcodes="RAS", lazy=lazy),
            Spacing(pixdim=SPACING[::-1], mode="bilinear", padding_mode="border", lazy=lazy),
            ResizeWithPadOrCrop(SHAPE[::-1], constant_values=-1024, lazy=lazy),
            ScaleIntensityRange(*WINDOW, -1.0, 1.0, clip=True),
        ]
    )


def monai(kind: str) -> Callable[[Path], Any]:
    """MONAI's datasets: Dataset reads each time; Persistent and Cache are measured when they are filled."""
    from monai.data import CacheDataset, Dataset, PersistentDataset

    chain = monai_chain(kind == "lazy")
    if kind in ("Dataset", "lazy"):
        return lambda path: Dataset([str(path)], chain)[0]
    if kind == "CacheDataset":
        cached = functools.cache(lambda path: CacheDataset([str(path)], chain, num_workers=1, progress=False))
        return lambda path: cached(path)[0]
    folder = tempfile.mkdtemp()
    return lambda path: PersistentDataset([str(path)], chain, cache_dir=folder)[0]


def torchio() -> Callable[[Path], Any]:
    """TorchIO's transforms of the same names."""
    import torchio as tio

    chain = tio.Compose(
        [tio.ToCanonical(), tio.Resample(SPACING[::-1]), tio.CropOrPad(SHAPE[::-1], padding_mode=-1024),
         tio.Clamp(*WINDOW), tio.RescaleIntensity((-1, 1), in_min_max=WINDOW)]
    )  # fmt: skip
    return lambda path: chain(tio.ScalarImage(path)).data
