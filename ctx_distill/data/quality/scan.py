"""Facts and faults of one CT scan, by rules that need no other scan."""

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
"""HU of the first edge and the last, and the number of bins; what lies beyond counts in the outer ones."""

_USUAL_INTERCEPTS = (-1024.0, -1000.0, -1023.0, -8192.0)
_GOOD, _POOR = 0.05, 0.01
_LITRE_MM3 = 1e6
_LUNG_LITRES, _SIDE_LITRES, _TWO_LUNGS_MM = 0.8, 0.15, 200.0


class _Warnings(logging.Handler):
    """Keeps what the readers log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def check_scan(scan_file: ScanFile) -> tuple[dict[str, Any], list[Fault], Volume]:
    """Read a scan and look at it; `InputError` as `ScanFile.read`.

    Returns:
        Facts as JSON values (shape, spacing in mm, orientation, HU percentiles, histogram, lung volumes in litres, hash
        of the content), faults, and the scan.
    """
    told, reader = _Warnings(), logging.getLogger("ctx_distill.data")
    reader.addHandler(told)
    try:
        scan = scan_file.read()
    finally:
        reader.removeHandler(told)
    faults = [Fault("warning", "reader", text) for text in told.texts]
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
    """Of the voxels and their shape: equal for copies under another name, header or compression."""
    digest = hashlib.blake2b(repr((scan.voxels.shape, scan.voxels.dtype.str)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(scan.voxels).data)
    return digest.hexdigest()


def geometry(scan: Volume) -> dict[str, Any]:
    """Shape and spacing along the file's axes, where those point, and how far they stray from the patient's axes."""
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
    """What no chest CT's geometry is: slices over 10 mm, pixels over 5 mm or voxels under .2 mm, less than 120 mm along an axis or
    more than a metre, two axes along one direction, over 30 degrees of obliquity."""
    found = []
    finest, _, coarsest = sorted(facts["spacing_mm"])
    width, depth, height = facts["extent_mm"]
    told = " x ".join(f"{v:g}" for v in facts["spacing_mm"])
    if coarsest > 10 or finest > 5 or coarsest < 0.2:
        found.append(Fault("warning", "spacing", f"spacing {told} mm; expected .2 to 5 mm in plane and 10 mm at most"))
    if not 120 <= height <= 1000 or min(width, depth) < 120 or max(width, depth) > 1000:
        found.append(
            Fault(
                "warning", "extent", f"{width:g} x {depth:g} x {height:g} mm (left, back, up); expected a whole chest"
            )
        )
    if len({letter.translate(str.maketrans("RAI", "LPS")) for letter in facts["orientation"]}) < 3:
        found.append(Fault("error", "orientation", f"axes {facts['orientation']}: two along one direction"))
    elif facts["oblique_degrees"] > 30:
        found.append(Fault("warning", "orientation", f"axes {facts['oblique_degrees']:.0f} degrees off the patient's"))
    return found


def intensities(hu: NDArray[np.float32]) -> dict[str, Any]:
    """Percentiles and the histogram of some 200,000 voxels."""
    low, high, bins = HISTOGRAM
    counts, _ = np.histogram(hu.clip(low, high), bins=bins, range=(low, high))
    one, half, most = (float(v) for v in np.percentile(hu, (1, 50, 99)))
    return {"hu_1": one, "hu_50": half, "hu_99": most, "histogram": [round(c / len(hu), 5) for c in counts]}


def _empty(scan: Volume, hu: NDArray[np.float32]) -> list[Fault]:
    """A volume of (nearly) one value is no scan; slices of one value are a cut-off or padded one."""
    values, counts = np.unique(hu, return_counts=True)
    if counts.max() > 0.99 * len(hu):
        return [Fault("error", "empty", f"{counts.max() / len(hu):.1%} of the voxels are {values[counts.argmax()]:g}")]
    # The scanner's circle leaves blank rows and columns; blank slices are a scan that was cut off, or padded.
    axis = int(np.abs(scan.affine_lps[2, :3]).argmax())
    others = tuple(i for i in range(3) if i != axis)
    thin = scan.voxels[tuple(slice(None) if i == axis else slice(None, None, 4) for i in range(3))]
    blank = int((thin.max(axis=others) == thin.min(axis=others)).sum())
    share = blank / scan.voxels.shape[axis]
    return [Fault("warning", "blank_slices", f"{blank} slices ({share:.0%}) hold one value")] if share > 0.1 else []


def scale_faults(voxels: NDArray[Any]) -> list[Fault]:
    """Whether values are HU: over 5 % air (-1100 to -750) and over 5 % soft tissue (-150 to 250) are; under 1 % of one is not.

    Where taking off one usual intercept (-1024, -1000, -1023, -8192) makes it a chest, the intercept was applied twice; where
    applying it does, it was not applied at all.
    """
    air, soft = tissue_shares(voxels)
    if min(air, soft) >= _POOR:
        return []
    told = f"{air:.1%} of the voxels are air and {soft:.1%} soft tissue by their HU"
    for intercept in _USUAL_INTERCEPTS:
        if min(tissue_shares(voxels, 1.0, -intercept)) > _GOOD:
            return [Fault("error", "slope_twice", f"{told}; without one intercept of {intercept:g} it is a chest")]
        if min(tissue_shares(voxels, 1.0, intercept)) > _GOOD:
            return [Fault("error", "slope_missing", f"{told}; with an intercept of {intercept:g} it is a chest")]
    return [
        Fault(
            "error", "not_hu", f"{told}, under no usual intercept either; values {voxels.min():g} to {voxels.max():g}"
        )
    ]


def lung_litres(scan: Volume) -> dict[str, Any]:
    """Air inside the body on either side of its middle, in litres, on a grid of 4 mm."""
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
    """A lung is missing, collapsed or cut off: under .8 l of air inside the body, under .15 l on one side of its middle, or a
    scan narrower than 200 mm from right to left, which holds one lung at most."""
    right, left = litres["lung_right_l"], litres["lung_left_l"]
    if width < _TWO_LUNGS_MM:
        return [Fault("warning", "lung_missing", f"{width:g} mm from right to left; two lungs are wider")]
    if right + left < _LUNG_LITRES or min(right, left) < _SIDE_LITRES:
        told = f"{right:.2f} l of air in the body's right half, {left:.2f} l in its left"
        return [Fault("warning", "lung_missing", told + "; expected two aerated lungs")]
    return []
