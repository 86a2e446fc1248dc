"""Read a CT volume of any supported format in Hounsfield units, with its geometry.

The voxels stay on the scanner's grid and in the file's order; `ctx_distill.data.transforms.model_volume` resamples them
to the model's grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ctx_distill.data.io.dicom import read_dicom_folder
from ctx_distill.data.io.itk import read_itk
from ctx_distill.data.io.nifti import read_nifti
from ctx_distill.data.io.npz import read_npz
from ctx_distill.errors import InputError

VoxelArray = NDArray[np.int16] | NDArray[np.float32]

SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".npz")
# Wider than the range of any CT scanner. Metres read as millimetres give 0.0007, micrometres 700.
_SPACING_MM = (0.02, 50.0)


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan on its native grid.

    Attributes:
        voxels: (k0, k1, k2), C-contiguous int16 or float32 in HU, with the file's slope and intercept applied.
        affine_lps: (4, 4) float64, maps the array index (k0, k1, k2, 1) of a voxel's centre to millimetres along the
            patient's Left, Posterior, Superior axes (as in DICOM).
        path: file or DICOM folder.
    """

    voxels: VoxelArray
    affine_lps: NDArray[np.float64]
    path: Path

    @property
    def spacing(self) -> tuple[float, float, float]:
        """The distance in mm between voxels along each array axis (k0, k1, k2)."""
        a, b, c = np.linalg.norm(self.affine_lps[:3, :3], axis=0)
        return float(a), float(b), float(c)


def read_volume(path: Path) -> Volume:
    """Read NIfTI (.nii, .nii.gz), NRRD, MHA, MHD, an npz file of Rad-ChestCT, or a folder of DICOM slices.

    Raises:
        InputError: a missing path or unsupported format; a damaged or truncated file; more voxels than the file can
            hold or than 4e9 (checked before allocation); not three-dimensional, colour or complex; fewer than two
            voxels along an axis; NaN or infinite voxels; a singular affine or an implausible spacing; missing,
            duplicate or unevenly spaced DICOM slices.
    """
    path = Path(path)
    name = path.name.lower()
    try:
        if path.is_dir():
            voxels, affine = read_dicom_folder(path)
        elif not path.exists():
            raise InputError(f"{path}: no such file or folder; expected a CT volume, correct the path")
        elif name.endswith((".nii", ".nii.gz")):
            voxels, affine = read_nifti(path)
        elif name.endswith((".nrrd", ".nhdr", ".mha", ".mhd")):
            voxels, affine = read_itk(path)
        elif name.endswith(".npz"):
            voxels, affine = read_npz(path)
        elif name.endswith((".dcm", ".ima")):
            raise InputError(f"{path}: single DICOM file; expected a volume, pass the folder of its slices")
        else:
            raise InputError(
                f"{path}: unknown suffix; expected {', '.join(SUFFIXES)} or a folder of DICOM slices, convert the file"
            )
    except OSError as error:
        raise InputError(
            f"{path}: cannot read the file ({error.strerror or error}); check the file and its permissions"
        ) from error
    except MemoryError as error:
        raise InputError(f"{path}: does not fit into memory; check that the file is a CT volume") from error
    _check_affine(path, affine)
    return Volume(_compact(path, voxels), affine, path)


def _check_affine(path: Path, affine: NDArray[np.float64]) -> None:
    if not np.isfinite(affine).all():
        raise InputError(f"{path}: the affine contains NaN or infinity; expected finite numbers, repair the header")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    spacing_text = " x ".join(f"{s:g}" for s in spacing)
    if not ((spacing >= _SPACING_MM[0]) & (spacing <= _SPACING_MM[1])).all():
        raise InputError(
            f"{path}: spacing of {spacing_text} mm; expected {_SPACING_MM[0]:g} to {_SPACING_MM[1]:g} mm along each axis, "
            "repair the header (is it in another unit?)"
        )
    # Volume of the unit cell relative to a box with the same edges: 1 for orthogonal axes, 0 for a flat cell.
    skew = abs(np.linalg.det(affine[:3, :3])) / float(np.prod(spacing))
    if skew < 0.1:
        raise InputError(
            f"{path}: the affine is singular (two array axes point the same way); expected three independent axes, "
            "repair the header"
        )


def _compact(path: Path, voxels: NDArray[np.generic]) -> VoxelArray:
    """Return the voxels as int16 if that is lossless, otherwise float32; reject NaN and infinity."""
    if min(voxels.shape) < 2:
        raise InputError(
            f"{path}: array of {' x '.join(map(str, voxels.shape))} voxels; expected at least two voxels along each axis"
        )
    if voxels.dtype == np.int16:
        return np.ascontiguousarray(voxels)
    # min and max propagate NaN, which avoids a boolean array as large as the scan.
    low, high = float(voxels.min()), float(voxels.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{path}: NaN or infinite voxels; expected finite HU, export the scan again")
    if np.issubdtype(voxels.dtype, np.integer) and low >= -32768 and high <= 32767:
        return np.ascontiguousarray(voxels, dtype=np.int16)
    if max(abs(low), abs(high)) > np.finfo(np.float32).max:
        raise InputError(f"{path}: voxels up to {high:g}; expected HU, export the scan again")
    return np.ascontiguousarray(voxels, dtype=np.float32)
