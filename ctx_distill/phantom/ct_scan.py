"""A CT of a phantom: field of view, noise, and the bytes of a NIfTI file in one of several storage orientations."""

from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ctx_distill.phantom.anatomy import Person
from ctx_distill.phantom.canvas import Canvas, Grid
from ctx_distill.phantom.lesions import paint_chest
from ctx_distill.phantom.planted_findings import PlantedFinding

PADDING = -1024
"""HU outside the circle that a scanner reconstructs."""


def ct_grid(person: Person, rng: np.random.Generator) -> Grid:
    """Draws the field of view of a scan: 76 to 84 slices of 96 x 96 voxels of about 3.7 mm."""
    wide = 2 * (person.cage_width + person.wall) * float(rng.uniform(1.03, 1.12))
    pixel = round(wide / 96, 3)
    slices = int(rng.choice([76, 80, 84]))
    tall = person.lung_top - person.lung_base + float(rng.uniform(22, 42))
    return Grid(
        shape=(slices, 96, 96),
        spacing=(round(tall / slices, 3), pixel, pixel),
        centre=(
            0.5 * (person.lung_top + person.lung_base) + float(rng.normal(0, 4)),
            float(rng.normal(6, 6)),
            float(rng.normal(0, 5)),
        ),
        yaw=float(np.clip(rng.normal(0, 0.05), -0.13, 0.13)),
    )


def ct_volume(
    person: Person, findings: list[PlantedFinding], grid: Grid, rng: np.random.Generator
) -> NDArray[np.int16]:
    """The scan (D, H, W) of a person in HU, axes growing towards Superior, Posterior, Left."""
    canvas = Canvas(grid)
    paint_chest(canvas, person, findings, upright=False)
    noise = rng.standard_normal(grid.shape, np.float32) * np.float32(rng.uniform(8, 20))
    # A reconstruction's kernel: part of the noise is smooth in the slice.
    noise += ndimage.uniform_filter(noise, (1, 2, 2)) * np.float32(rng.uniform(0, 1))
    hu = np.maximum(canvas.hu + noise, PADDING)
    across, along = grid.axis(2)[None, :], grid.axis(1)[:, None]
    outside = across**2 + along**2 > (0.5 * grid.shape[2] * grid.spacing[2]) ** 2
    hu[:, outside] = PADDING
    return np.round(hu).astype(np.int16)


def nifti_bytes(volume: NDArray[np.int16], grid: Grid, codes: str) -> bytes:
    """A .nii.gz file of a volume (D, H, W) that grows towards Superior, Posterior, Left.

    Args:
        volume: HU.
        grid: spacing and field of view of the volume.
        codes: storage orientation, by the direction in which each stored axis grows, such as "LPS", "RAS" or "LAS".

    Returns:
        The same bytes for the same input: gzip's time stamp is 0.
    """
    spacing = np.asarray(grid.spacing)[::-1]
    first = -0.5 * (np.asarray(grid.shape)[::-1] - 1) * spacing  # x, y, z of the first voxel; the bed's frame, mm
    # NIfTI's world grows to the Right, Anterior, Superior: x and y change their sign.
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = [-first[0], -first[1], first[2]]
    image = nib.Nifti1Image(np.ascontiguousarray(volume.transpose(2, 1, 0)), affine)
    wanted = nib.orientations.axcodes2ornt(tuple(codes))
    turn = nib.orientations.ornt_transform(nib.orientations.io_orientation(affine), wanted)
    image = image.as_reoriented(turn)
    image.header.set_xyzt_units("mm")
    image.header.set_data_dtype(np.int16)
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
