"""A scan's file with what its data set says of it elsewhere: slope, intercept and spacing out of a metadata table.

CT-RATE's first release holds raw values without a spacing, and a CSV beside them holds the rest. Applying slope and
intercept to files that already hold HU is that field's most reported mistake, so it is looked for here.
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
    """Where a scan lies and what overrides its header.

    Attributes:
        path: file or folder of DICOM slices; of a remote one, what messages call it.
        slope: with `intercept`, takes the file's values to HU; None leaves them.
        intercept: HU.
        spacing: mm along the file's own x, y, z (its fastest axis first); None keeps the header's.
        url: an fsspec address (s3://bucket/scan.nii.gz) to read in place of `path`.
    """

    path: Path
    slope: float | None = None
    intercept: float | None = None
    spacing: tuple[float, float, float] | None = None
    url: str | None = None

    def read(self) -> Volume:
        """The scan in HU on its own grid.

        Raises:
            InputError: as `read_volume`; values that are HU already although a slope and intercept are given.
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
                    f"{self.path}: holds HU already ({as_stored[0]:.0%} air, {as_stored[1]:.0%} soft tissue), and the"
                    f" manifest asks for slope {slope:g}, intercept {intercept:g} once more; blank both columns for it, or"
                    " make the manifest again with --release fixed"
                )
            voxels = to_hounsfield(voxels, slope, intercept)
        return Volume(voxels, affine, scan.path)

    def stamp(self) -> dict[str, object]:
        """Bytes and the latest modification time (ns) of the file, or of a folder's files; and the overrides.

        Raises:
            InputError: it cannot be looked at.
        """
        if self.url is not None:
            return {**remote_stamp(self.url), **self.facts()}
        try:
            files = [file for file in self.path.iterdir() if file.is_file()] if self.path.is_dir() else [self.path]
            facts = [file.stat() for file in files]
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be read ({error.strerror}); check the path and its rights."
            ) from error
        latest = max((f.st_mtime_ns for f in facts), default=0)
        return {"bytes": sum(f.st_size for f in facts), "mtime_ns": latest, **self.facts()}

    def facts(self) -> dict[str, object]:
        """The overrides that are set, as JSON values."""
        named = {"slope": self.slope, "intercept": self.intercept, "spacing": self.spacing}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in named.items() if v is not None}
