"""Write a scan as NIfTI with its geometry but no names or dates."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ctx_distill.files import write_bytes

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_nifti(path: Path, voxels: NDArray[Any], affine_lps: NDArray[np.float64]) -> None:
    """Write a .nii.gz or .nii file atomically.

    Args:
        path: output file; compressed if the suffix is .gz.
        voxels: (k0, k1, k2) in HU.
        affine_lps: (4, 4), index (k0, k1, k2) to LPS mm, as in `Volume`.
    """
    ras = (_LPS_TO_RAS @ affine_lps)[:, [2, 1, 0, 3]]
    image = nib.Nifti1Image(np.ascontiguousarray(voxels).T, ras, dtype=voxels.dtype)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    write_bytes(path, gzip.compress(content, compresslevel=3, mtime=0) if path.suffix == ".gz" else content)
