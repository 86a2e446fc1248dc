"""Compute a CT's frontal projection: line integrals of attenuation along the anterior-posterior axis, toned like a film.

It is computed from the stored scan, before any crop by the volume spec. The X-ray expert uses it as a second teacher
signal and as a baseline (both **ours**, beyond the paper).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ctx_distill.data.io.volume import Volume
from ctx_distill.data.transforms.resample import resample

PROJECTION_VERSION = 1
"""Part of cache keys; increase it when the same scan gives a different image."""

WATER_PER_MM = 0.0175
"""Attenuation of water at about 80 keV, the effective energy of a chest film (NIST XCOM: 0.0184 per mm)."""

BONE_FROM_HU = 100.0
BONE_GAIN = 0.7
"""HU above `BONE_FROM_HU` count 1.7-fold, because calcium attenuates more at the lower energies of a film than in CT."""

PIXEL_MM = 2.5
SIDE = 192
"""Edge length in pixels of the square image in a batch."""

BODY = 1.0
"""The image is cropped to rows and columns that reach this integral (about 6 cm of water), without air and couch."""

# Tone curve: percentiles of the image centre, and the slope of the sigmoid between them.
_CORE = (10.0, 93.0)
_SLOPE = 3.4
_SLAB = 1 << 21  # voxels summed at once: bounds the memory
_OBLIQUE = 0.02  # |cosine| between an array axis and another patient axis above which the scan is resampled first


def line_integrals(volume: Volume, pixel_mm: float = PIXEL_MM) -> NDArray[np.float32]:
    """Return integrals of attenuation along the anterior-posterior axis, upright, with the patient's right on the left.

    mu(HU) = mu_water (1 + HU / 1000 + `BONE_GAIN` max(HU - `BONE_FROM_HU`, 0) / 1000), at least 0; there is
    air beyond the scan. Beams are parallel.

    Args:
        volume: scan of any orientation; scans oblique to the patient's axes are resampled to `pixel_mm` first.
        pixel_mm: pixel edge length in mm.

    Returns:
        (H, W) float32, unitless: negative logarithm of the transmitted fraction. Row 0 is cranial.
    """
    directions = volume.affine_lps[:3, :3] / np.linalg.norm(volume.affine_lps[:3, :3], axis=0)
    partner = np.abs(directions).argmax(axis=0)  # array axis -> patient axis (L, P, S)
    strays = np.abs(directions).sum(axis=0) - np.abs(directions).max(axis=0)
    if sorted(partner) != [0, 1, 2] or strays.max() > _OBLIQUE:
        volume = _straightened(volume, pixel_mm)
        partner = np.array([2, 1, 0])
    axis = {int(patient): array for array, patient in enumerate(partner)}
    summed = _sum_attenuation(volume, axis[1])
    if axis[2] > axis[0]:
        summed = summed.T
    # The patient's left is on the right of the image, and superior at the top.
    if volume.affine_lps[0, axis[0]] < 0:
        summed = summed[:, ::-1]
    if volume.affine_lps[2, axis[2]] > 0:
        summed = summed[::-1]
    spacing = (volume.spacing[axis[2]], volume.spacing[axis[0]])
    size = [max(1, round(n * mm / pixel_mm)) for n, mm in zip(summed.shape, spacing, strict=True)]
    picture = torch.from_numpy(np.ascontiguousarray(summed))[None, None]
    sampled: NDArray[np.float32] = F.interpolate(picture, size=size, mode="bilinear", antialias=True)[0, 0].numpy()
    return sampled


def _straightened(volume: Volume, pixel_mm: float) -> Volume:
    """Return the complete scan resampled along the patient's axes, (z, y, x) towards S, P, L."""
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in volume.voxels.shape])).reshape(3, -1)
    millimetres = volume.affine_lps[:3, :3] @ corners + volume.affine_lps[:3, 3:]
    low, high = millimetres.min(axis=1), millimetres.max(axis=1)
    count = np.ceil((high - low) / pixel_mm).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, ::-1] * pixel_mm
    affine[:3, 3] = (low + high) / 2 - pixel_mm * (count - 1) / 2
    shape = (int(count[2]), int(count[1]), int(count[0]))
    to_source = np.linalg.inv(volume.affine_lps) @ affine
    voxels = resample(volume.voxels, to_source, shape, outside=-1000.0, antialias=True).numpy()
    return Volume(voxels, affine, volume.path)


def _sum_attenuation(volume: Volume, axis: int) -> NDArray[np.float32]:
    """Return attenuation summed along an array axis, by slabs to avoid a second volume in memory."""
    slabs = 0 if axis else 1  # slabs are cut along an axis that is not summed
    length = volume.voxels.shape[slabs]
    step = max(1, _SLAB * length // volume.voxels.size)
    parts = []
    for start in range(0, length, step):
        at = [slice(None)] * 3
        at[slabs] = slice(start, start + step)
        hu = np.maximum(volume.voxels[tuple(at)], np.asarray(-1000, volume.voxels.dtype))
        total = hu.sum(axis=axis, dtype=np.float32) + np.float32(1000 * hu.shape[axis])
        bone = np.maximum(hu, np.asarray(BONE_FROM_HU, hu.dtype)).sum(axis=axis, dtype=np.float32)
        total += np.float32(BONE_GAIN) * (bone - np.float32(BONE_FROM_HU * hu.shape[axis]))
        parts.append(total)
    summed = np.concatenate(parts, axis=0)
    scaled: NDArray[np.float32] = summed * np.float32(WATER_PER_MM / 1000 * volume.spacing[axis])
    return scaled


def frontal_projection(volume: Volume, pixel_mm: float = PIXEL_MM) -> NDArray[np.float32]:
    """Return the frontal projection of a scan, with values as from `read_radiograph`.

    Line integrals (film density follows the logarithm of exposure) are cropped to the body and mapped by a sigmoid tone
    curve between two percentiles of the image centre.

    Args:
        volume: scan of any orientation.
        pixel_mm: pixel edge length in mm.

    Returns:
        (H, W) float32 in [0, 1]: bone bright, upright, the patient's right on the left of the image.
    """
    film = _cut_to_body(line_integrals(volume, pixel_mm))
    rows, columns = film.shape
    core = film[rows // 6 : rows - rows // 6, columns // 6 : columns - columns // 6]
    low, high = np.percentile(core, _CORE)
    tone = 1 / (1 + np.exp(-_SLOPE * ((film - low) / max(high - low, 1e-3) - 0.5)))
    toned: NDArray[np.float32] = tone.astype(np.float32)
    return toned


def _cut_to_body(film: NDArray[np.float32]) -> NDArray[np.float32]:
    dense = film > BODY
    if not dense.any():
        return film
    rows, columns = np.flatnonzero(dense.any(axis=1)), np.flatnonzero(dense.any(axis=0))
    return film[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def square_projection(volume: Volume, side: int = SIDE) -> Tensor:
    """Return the frontal projection on a square of fixed size, so that scans of any extent form a batch.

    The shorter edge is padded with black, as outside a film's collimator.

    Args:
        volume: scan of any orientation.
        side: edge length in pixels.

    Returns:
        (side, side) float32 in [0, 1].
    """
    picture = torch.from_numpy(frontal_projection(volume))[None, None]
    missing = picture.shape[3] - picture.shape[2]
    before, after = abs(missing) // 2, abs(missing) - abs(missing) // 2
    pads = (0, 0, before, after) if missing > 0 else (before, after, 0, 0)
    square = F.pad(picture, pads)
    resized: Tensor = F.interpolate(square, size=(side, side), mode="bilinear", antialias=True)[0, 0]
    return resized.clamp(0, 1)
