"""What a model says of one scan."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctx_distill.data.io.write_nifti import write_nifti
from ctx_distill.data.transforms.resample import resample


@dataclass(frozen=True, eq=False)
class ScanGrid:
    """The voxels of a scan in its file's own order.

    Attributes:
        shape: (k0, k1, k2).
        affine_lps: (4, 4), index (k0, k1, k2, 1) to LPS mm.
    """

    shape: tuple[int, int, int]
    affine_lps: NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class Saliency:
    """Where in the scan a finding's logit comes from.

    Attributes:
        finding: its name.
        values: (D, H, W) float32 on the model's grid, 0 or more, in units of the logit.
        affine_lps: (4, 4), index (d, h, w, 1) to LPS mm.
        scan: the scan's own grid.
        method: `grad-cam` or `gradient`, see `ctx_distill.inference.saliency`.
    """

    finding: str
    values: NDArray[np.float32]
    affine_lps: NDArray[np.float64]
    scan: ScanGrid
    method: str

    def on_scan(self) -> NDArray[np.float32]:
        """(k0, k1, k2) float32: linearly resampled on the scan's voxels; 0 where the model saw nothing of the scan."""
        to_grid = np.linalg.inv(self.affine_lps) @ self.scan.affine_lps
        sampled: NDArray[np.float32] = resample(
            self.values, to_grid, self.scan.shape, outside=0.0, antialias=False
        ).numpy()
        return sampled

    def write(self, path: Path | str) -> None:
        """Write a .nii.gz whose shape and affine are the scan's; float32."""
        write_nifti(Path(path), self.on_scan(), self.scan.affine_lps)

    def __repr__(self) -> str:
        """Return one line without the values."""
        shape = " x ".join(str(size) for size in self.values.shape)
        return f"Saliency({self.finding}: {shape}, {self.method})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: method, shape, maximum and its position in LPS mm; `write` saves the map itself."""
        peak = np.unravel_index(int(self.values.argmax()), self.values.shape)
        return {
            "method": self.method,
            "shape": [int(size) for size in self.values.shape],
            "max": float(self.values.max()),
            "peak_lps_mm": [float(value) for value in (self.affine_lps @ np.array([*peak, 1.0]))[:3]],
        }


@dataclass(frozen=True)
class Neighbour:
    """A radiograph of the pool near a scan.

    Attributes:
        study_id: of the pool.
        image_id: of the pool.
        similarity: cosine of both embeddings.
        report: its report, "" where the index keeps none.
    """

    study_id: str
    image_id: str
    similarity: float
    report: str


SHOWN = 3
"""Number of findings that the short form of a prediction names."""


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """What a model says of one scan. A research tool's output: no diagnosis.

    Attributes:
        path: the file or DICOM folder.
        probabilities: by finding: the classifier's where there is one, else zero-shot.
        asked: `classifier` or `zero-shot`: whose they are.
        zero_shot: by finding, of the dual encoder, where there is one.
        embedding: (D,) float32, a unit vector in the space shared with reports; of a classifier that has no dual
            encoder, its encoder's pooled feature (D_c,), not normalised.
        scan: the scan's own grid.
        saliency: by finding, those asked for.
        report: a draft where asked for and there is a decoder.
    """

    path: Path
    probabilities: dict[str, float]
    asked: str
    zero_shot: dict[str, float]
    embedding: NDArray[np.float32]
    scan: ScanGrid
    saliency: dict[str, Saliency] = field(default_factory=dict)
    report: str | None = None

    def __repr__(self) -> str:
        """Return one line: the scan, its most probable findings, and what else there is."""
        ranked = sorted(self.probabilities.items(), key=lambda item: -item[1])
        parts = [f"{finding} {probability:.2f}" for finding, probability in ranked[:SHOWN]]
        if len(ranked) > SHOWN:
            parts.append(f"{len(ranked) - SHOWN} more")
        extras = [f"saliency of {', '.join(self.saliency)}"] if self.saliency else []
        if self.report is not None:
            extras.append(f"draft report of {len(self.report.split())} words")
        return f"Prediction({self.path.name}: {'; '.join([', '.join(parts) or 'no findings', *extras])}; {self.asked})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the fields, with arrays as lists and each saliency map as its summary."""
        return {
            "path": str(self.path),
            "probabilities": {finding: float(value) for finding, value in self.probabilities.items()},
            "asked": self.asked,
            "zero_shot": {finding: float(value) for finding, value in self.zero_shot.items()},
            "embedding": [float(value) for value in self.embedding],
            "scan": {"shape": [int(size) for size in self.scan.shape], "affine_lps": self.scan.affine_lps.tolist()},
            "saliency": {finding: found.to_dict() for finding, found in self.saliency.items()},
            "report": self.report,
        }
