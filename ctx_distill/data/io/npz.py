"""Read the NumPy archives of Rad-ChestCT: one array `ct` in HU on a grid of 0.8 mm, without a header."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ctx_distill.data.io.size_limits import check_size
from ctx_distill.errors import InputError

KEY = "ct"
SPACING_MM = 0.8


def read_npz(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return voxels (k, j, i), and their affine (4, 4) to LPS mm.

    Rad-ChestCT's arrays are (slice, row, column), 0.8 mm apart along each axis (Draelos et al. 2021). They store no
    orientation. According to the data set's extrema table, slices run from superior to inferior, rows from anterior to
    posterior, and columns from right to left.

    Raises:
        InputError: no array `ct`, pickled objects, a size that the file cannot hold, or a damaged file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if f"{KEY}.npy" not in names:
                raise InputError(
                    f"{path}: contains {', '.join(names) or 'nothing'}; expected the array {KEY!r} of Rad-ChestCT"
                )
            with archive.open(f"{KEY}.npy") as member:
                version = npy.read_magic(member)
                read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, _, dtype = read(member)
            if dtype.hasobject:
                raise InputError(
                    f"{path}: array {KEY!r} contains pickled objects, which are never loaded; expected numbers"
                )
            if dtype.kind not in "iuf":
                raise InputError(f"{path}: voxels of type {dtype}; expected one number per voxel, in HU")
            packed = archive.getinfo(f"{KEY}.npy")
            check_size(path, shape, dtype.itemsize, packed.compress_size, packed.compress_type != zipfile.ZIP_STORED)
            with archive.open(f"{KEY}.npy") as member:
                voxels: NDArray[Any] = npy.read_array(member, allow_pickle=False)
    except InputError:
        raise
    except (OSError, MemoryError):  # `read_volume` reports these for every format
        raise
    except Exception as error:  # zip, deflate and NumPy raise a dozen exception types on damaged files
        raise InputError(
            f"{path}: not a readable NumPy archive ({error}); the file is damaged, copy it again"
        ) from error
    affine = np.diag([SPACING_MM, SPACING_MM, -SPACING_MM, 1.0])[:, [2, 1, 0, 3]]
    return voxels, affine
