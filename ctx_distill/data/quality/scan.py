"""Check one CT scan with rules that do not depend on other scans."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctx_distill.data.io.hounsfield import sample_voxels, tissue_shares
from ctx_distill.data.io.scan_file import ScanFile
from ctx_distill.data.io.volume import Volume
from ctx_distill.data.quality.faults import Fault
from ctx_distill.data.transforms.coarse import COARSE_MM, LUNG_HU, body_mask, coarse_grid, enclosed

HISTOGRAM = (-1200.0, 3200.0, 44)
"""HU of the first and last edge, and the number of bins; values outside are counted in the outer bins."""

_USUAL_INTERCEPTS = (-1024.0, -1000.0, -1023.0, -8192.0)
_GOOD, _POOR = 0.05, 0.01
_LITRE_MM3 = 1e6
_LUNG_LITRES, _SIDE_LITRES, _TWO_LUNGS_MM = 0.8, 0.15, 200.0


class _Warnings(logging.Handler):
    """Collect the warnings that the readers log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def check_scan(scan_file: ScanFile) -> tuple[dict[str, Any], list[Fault], Volume]:
    """Read and check a scan.

    Returns:
        Facts as JSON values (shape, spacing in mm, orientation, HU percentiles, histogram, lung volumes in litres, hash
        of the content), faults, and the scan.

    Raises:
        InputError: as `ScanFile.read`.
    """
    warnings, reader = _Warnings(), logging.getLogger("ctx_distill.data")
    reader.addHandler(warnings)
    try:
        scan = scan_file.read()
    finally:
        reader.removeHandler(warnings)
    faults = [Fault("warning", "reader", text) for text in warnings.texts]
    hu = sample_voxels(scan.voxels)
    facts = {**geometry(scan), **intensities(hu), "content": content_hash(scan)}
    faults += geometry_faults(facts)
    if empty := _empty(scan, hu):
        return facts, [*faults, *empty], scan
    scale = scale_faults(scan.voxels)
    faults += scale
    if not scale:
        lungs = lung_litres(scan)
        facts |= lungs
        faults += lung_faults(lungs, facts["extent_mm"][0])
    return facts, faults, scan


def content_hash(scan: Volume) -> str:
    """Return a hash of voxels and shape, equal for copies with another name, header or compression."""
    digest = hashlib.blake2b(repr((scan.voxels.shape, scan.voxels.dtype.str)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(scan.voxels).data)
    return digest.hexdigest()


def geometry(scan: Volume) -> dict[str, Any]:
    """Return shape and spacing along the file's axes, their orientation, and their angle to the patient's axes."""
    axes = scan.affine_lps[:3, :3] / np.linalg.norm(scan.affine_lps[:3, :3], axis=0)
    nearest = np.abs(axes).argmax(axis=0)
    letters = "".join("LPS"[axis] if axes[axis, i] > 0 else "RAI"[axis] for i, axis in enumerate(nearest))
    oblique = float(np.degrees(np.arccos(np.clip(np.abs(axes).max(axis=0).min(), 0, 1))))
    extent = [0.0, 0.0, 0.0]
    for i, axis in enumerate(nearest):
        extent[int(axis)] += scan.voxels.shape[i] * scan.spacing[i]
    return {
        "shape": list(scan.voxels.shape), "spacing_mm": [round(v, 4) for v in scan.spacing], "orientation": letters,
        "oblique_degrees": round(oblique, 2), "extent_mm": [round(v, 1) for v in extent],
    }  # fmt: skip


def geometry_faults(facts: dict[str, Any]) -> list[Fault]:
    """Return the faults of a geometry that is implausible for a chest CT.

    Implausible are slices over 10 mm, pixels over 5 mm, voxels under 0.2 mm, an extent below 120 mm or above 1000 mm, two
    axes along one direction, and an obliquity over 30 degrees.
    """
    faults = []
    finest, _, coarsest = sorted(facts["spacing_mm"])
    width, depth, height = facts["extent_mm"]
    spacing = " x ".join(f"{v:g}" for v in facts["spacing_mm"])
    if coarsest > 10 or finest > 5 or coarsest < 0.2:
        faults.append(
            Fault("warning", "spacing", f"spacing {spacing} mm; expected 0.2 to 5 mm in plane, at most 10 mm per slice")
        )
    if not 120 <= height <= 1000 or min(width, depth) < 120 or max(width, depth) > 1000:
        faults.append(
            Fault(
                "warning",
                "extent",
                f"{width:g} x {depth:g} x {height:g} mm (left, back, up); expected a complete chest",
            )
        )
    if len({letter.translate(str.maketrans("RAI", "LPS")) for letter in facts["orientation"]}) < 3:
        faults.append(Fault("error", "orientation", f"axes {facts['orientation']}: two axes along one direction"))
    elif facts["oblique_degrees"] > 30:
        faults.append(
            Fault("warning", "orientation", f"axes {facts['oblique_degrees']:.0f} degrees from the patient's axes")
        )
    return faults


def intensities(hu: NDArray[np.float32]) -> dict[str, Any]:
    """Return the percentiles and the histogram of sampled voxels in HU."""
    low, high, bins = HISTOGRAM
    counts, _ = np.histogram(hu.clip(low, high), bins=bins, range=(low, high))
    one, half, most = (float(v) for v in np.percentile(hu, (1, 50, 99)))
    return {"hu_1": one, "hu_50": half, "hu_99": most, "histogram": [round(c / len(hu), 5) for c in counts]}


def _empty(scan: Volume, hu: NDArray[np.float32]) -> list[Fault]:
    """Return the faults of a (nearly) constant volume or of constant slices."""
    values, counts = np.unique(hu, return_counts=True)
    if counts.max() > 0.99 * len(hu):
        return [Fault("error", "empty", f"{counts.max() / len(hu):.1%} of the voxels are {values[counts.argmax()]:g}")]
    # Blank rows and columns lie outside the circular field of view; blank slices mean a truncated or padded scan.
    axis = int(np.abs(scan.affine_lps[2, :3]).argmax())
    others = tuple(i for i in range(3) if i != axis)
    thin = scan.voxels[tuple(slice(None) if i == axis else slice(None, None, 4) for i in range(3))]
    blank = int((thin.max(axis=others) == thin.min(axis=others)).sum())
    share = blank / scan.voxels.shape[axis]
    return [Fault("warning", "blank_slices", f"{blank} slices ({share:.0%}) are constant")] if share > 0.1 else []


def scale_faults(voxels: NDArray[Any]) -> list[Fault]:
    """Return a fault if the values are not in HU.

    Values with under 1 % air (-1100 to -750) or soft tissue (-150 to 250) are not in HU. If removing a common intercept
    (-1024, -1000, -1023, -8192) gives over 5 % of both, it was applied twice; if adding it does, it was never applied.
    """
    air, soft = tissue_shares(voxels)
    if min(air, soft) >= _POOR:
        return []
    shares = f"{air:.1%} of the voxels have HU of air and {soft:.1%} of soft tissue"
    for intercept in _USUAL_INTERCEPTS:
        if min(tissue_shares(voxels, 1.0, -intercept)) > _GOOD:
            return [Fault("error", "slope_twice", f"{shares}; plausible with an intercept of {intercept:g} removed")]
        if min(tissue_shares(voxels, 1.0, intercept)) > _GOOD:
            return [Fault("error", "slope_missing", f"{shares}; plausible with an intercept of {intercept:g} applied")]
    return [
        Fault(
            "error",
            "not_hu",
            f"{shares}, implausible with any common intercept; values {voxels.min():g} to {voxels.max():g}",
        )
    ]


def lung_litres(scan: Volume) -> dict[str, Any]:
    """Return the volume of air in the right and left half of the body in litres, on a grid of 4 mm."""
    hu, (_, _, left) = coarse_grid(scan)
    body = body_mask(hu)
    lung = enclosed(hu < LUNG_HU) & (hu < LUNG_HU)
    columns = body.sum(axis=(0, 1))
    middle = float((columns * left).sum() / max(1, columns.sum()))
    litres = lung.sum(axis=(0, 1)) * COARSE_MM**3 / _LITRE_MM3
    return {
        "lung_right_l": round(float(litres[left < middle].sum()), 2),
        "lung_left_l": round(float(litres[left >= middle].sum()), 2),
    }


def lung_faults(litres: dict[str, Any], width: float) -> list[Fault]:
    """Return a fault if a lung is missing, collapsed or cut off.

    That is under 0.8 l of air inside the body, under 0.15 l in one half, or a scan narrower than 200 mm.
    """
    right, left = litres["lung_right_l"], litres["lung_left_l"]
    if width < _TWO_LUNGS_MM:
        return [
            Fault(
                "warning",
                "lung_missing",
                f"{width:g} mm from right to left; expected at least {_TWO_LUNGS_MM:g} mm for two lungs",
            )
        ]
    if right + left < _LUNG_LITRES or min(right, left) < _SIDE_LITRES:
        volumes = f"{right:.2f} l of air in the right half of the body, {left:.2f} l in the left"
        return [Fault("warning", "lung_missing", volumes + "; expected two aerated lungs")]
    return []
