"""A scan's file together with the slope, intercept and spacing that its data set stores in a metadata table.

The first release of CT-RATE stores raw values without a spacing; slope, intercept and spacing are in a CSV file.
Applying slope and intercept to files that are in HU already is a common mistake, so it is detected here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctx_distill.data.io.hounsfield import tissue_shares, to_hounsfield
from ctx_distill.data.io.remote import read_remote, remote_stamp
from ctx_distill.data.io.volume import Volume, read_volume
from ctx_distill.errors import InputError

_CLEARLY_HU, _CLEARLY_NOT = 0.05, 0.01


@dataclass(frozen=True)
class ScanFile:
    """The location of a scan and the values that override its header.

    Attributes:
        path: file or folder of DICOM slices; for a remote scan, the name used in messages.
        slope: with `intercept`, maps stored values to HU; None keeps the stored values.
        intercept: HU.
        spacing: mm along the file's x, y, z axes (fastest first); None keeps the header's spacing.
        url: fsspec URL (s3://bucket/scan.nii.gz) to read instead of `path`.
    """

    path: Path
    slope: float | None = None
    intercept: float | None = None
    spacing: tuple[float, float, float] | None = None
    url: str | None = None

    def read(self) -> Volume:
        """Read the scan in HU on its native grid.

        Raises:
            InputError: as `read_volume`, or a slope and intercept are set although the values are in HU already.
        """
        scan = read_volume(self.path) if self.url is None else read_remote(self.url)
        affine, voxels = scan.affine_lps, scan.voxels
        if self.spacing is not None:
            steps = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0) * np.array(self.spacing[::-1])
            affine = np.block([[steps, affine[:3, 3:]], [affine[3:]]])
        slope, intercept = self.slope or 1.0, self.intercept or 0.0
        if (slope, intercept) != (1.0, 0.0):
            as_stored = tissue_shares(voxels)
            scaled = tissue_shares(voxels, slope, intercept)
            if min(as_stored) > _CLEARLY_HU and min(scaled) < _CLEARLY_NOT:
                raise InputError(
                    f"{self.path}: values are in HU already ({as_stored[0]:.0%} air, {as_stored[1]:.0%} soft tissue), but"
                    f" the manifest sets slope {slope:g} and intercept {intercept:g}; clear both columns for this scan,"
                    " or rebuild the manifest with --release fixed"
                )
            voxels = to_hounsfield(voxels, slope, intercept)
        return Volume(voxels, affine, scan.path)

    def stamp(self) -> dict[str, object]:
        """Return the size in bytes, the latest modification time (ns) and the overrides of the file or folder.

        Raises:
            InputError: the file or folder cannot be accessed.
        """
        if self.url is not None:
            return {**remote_stamp(self.url), **self.facts()}
        try:
            files = [file for file in self.path.iterdir() if file.is_file()] if self.path.is_dir() else [self.path]
            facts = [file.stat() for file in files]
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot access it ({error.strerror}); check the path and its permissions"
            ) from error
        latest = max((f.st_mtime_ns for f in facts), default=0)
        return {"bytes": sum(f.st_size for f in facts), "mtime_ns": latest, **self.facts()}

    def facts(self) -> dict[str, object]:
        """Return the overrides that are set, as JSON values."""
        named = {"slope": self.slope, "intercept": self.intercept, "spacing": self.spacing}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in named.items() if v is not None}
