"""Saliency maps over slices: their files in `RUN/saliency/`, the planes through a map's peak, and their colours."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctx_distill.data.io.volume import Volume, read_volume
from ctx_distill.data.transforms.coarse import Box, body_mask, coarse_grid, sample
from ctx_distill.files import hash_json
from ctx_distill.reporting.pictures import (
    LUNG_WINDOW,
    SOFT_WINDOW,
    Picture,
    Plane,
    find_lungs,
    sample_plane,
    slice_picture,
)

FOLDER = "saliency"
RECORD = "saliency.json"
# Viridis (Smith and van der Walt 2015): perceptually uniform, also for colour-blind readers and in grayscale.
RAMP = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
FLOOR = 0.2
"""Share of the map's maximum below which values are transparent."""
OPACITY = (0.35, 0.65)
SOFT_REGIONS = ("heart", "mediastinum", "pericardium", "vessels", "diaphragm", "bones", "thorax")
PLANES: dict[Plane, str] = {"axial": "Axial", "coronal": "Coronal", "sagittal": "Sagittal"}

Key = tuple[str, str, str]
"""Model (`zero_shot`, `classifier`), study, finding."""


@dataclass(frozen=True)
class Shown:
    """Slices of one scan with a model's saliency for one finding.

    Attributes:
        pictures: Pairs of title and picture.
        method: `grad-cam` or `gradient`; "" without a map, where the slices pass through the lungs.
        problem: Why pictures or the map are missing, or a remark on the map; else "".
    """

    pictures: tuple[tuple[str, Picture], ...]
    method: str
    problem: str = ""


def map_file(model: str, study: str, finding: str) -> str:
    """Return a map's path below `RUN/saliency/`, unique per model, study and finding."""

    def part(name: str) -> str:
        slug = re.sub(r"[^\w.-]", "_", name).strip(".")
        return slug if slug == name else f"{slug}-{hash_json(name)[:8]}"

    return f"{model}/{part(study)}/{part(finding.replace(' ', '_'))}.nii.gz"


def read_record(run: Path) -> dict[Key, dict[str, Any]]:
    """Return the maps listed in `RUN/saliency/saliency.json`; {} if there are none."""
    try:
        listed = json.loads((run / FOLDER / RECORD).read_text(encoding="utf-8"))["maps"]
        return {(str(one["model"]), str(one["study_id"]), str(one["finding"])): dict(one) for one in listed}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def show_finding(
    run: Path,
    record: Mapping[Key, Mapping[str, Any]],
    key: Key,
    scan: Volume,
    planes: tuple[Plane, ...],
    region: str = "",
) -> Shown:
    """Return slices through the peak of a map, overlaid with it; without a map, slices through the lungs.

    Args:
        run: The run folder.
        record: Result of `read_record`.
        key: Key of the map.
        scan: The scan in HU, on its original grid.
        planes: Planes to show.
        region: Region of the finding; it selects the soft-tissue or the lung window.
    """
    soft = region in SOFT_REGIONS
    body, point = find_lungs(scan)
    one, trouble = record.get(key), "There is no saliency map of this finding; the slices pass through the lungs."
    found: Volume | None = None
    if one is not None:
        try:
            found = read_volume(run / FOLDER / str(one["file"]))
            if found.voxels.shape != scan.voxels.shape or not np.allclose(found.affine_lps, scan.affine_lps, atol=1e-2):
                found, trouble = None, "The saliency map is on another grid than the scan and is not shown."
            elif not found.voxels.max() > 0:
                found, trouble = (
                    None,
                    "The saliency map is 0 everywhere: nothing in the scan contributed to the finding.",
                )
        except (OSError, ValueError, KeyError) as error:
            found, trouble = None, f"The saliency map could not be read: {error}"
    if found is None:
        return Shown(tuple(_pictures(scan, None, planes, point, body, soft)), "", trouble)
    point, note = peak(found), ""
    inside = _inside(scan)
    if not within(inside, point):
        inner = peak_within(inside, found)
        ending = "; the slices pass through its maximum inside the body." if inner else "."
        point, note = inner or point, f"The map's maximum is outside the body{ending}"
    body = _holding(body, point)
    return Shown(tuple(_pictures(scan, found, planes, point, body, soft)), str((one or {}).get("method", "")), note)


def _holding(box: Box, point: tuple[float, float, float]) -> Box:
    """Return the box, extended to contain the point."""
    low = [min(a, b) for a, b in zip(box.low, point, strict=True)]
    high = [max(a, b) for a, b in zip(box.high, point, strict=True)]
    return Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))


def peak(found: Volume) -> tuple[float, float, float]:
    """Return the (Left, Posterior, Superior) mm of a map's maximum; among equal voxels, the middle one in file order."""
    best = np.flatnonzero(found.voxels == found.voxels.max())
    index = np.unravel_index(int(best[len(best) // 2]), found.voxels.shape)
    left, posterior, superior = (found.affine_lps @ np.array([*index, 1.0]))[:3]
    return float(left), float(posterior), float(superior)


Inside = tuple[NDArray[np.bool_], NDArray[np.float64]]
"""The body with what it encloses, on a coarse grid (z, y, x), and the grid's points (3, z, y, x) in LPS mm."""


def _inside(scan: Volume) -> Inside:
    from scipy import ndimage

    hu, (superior, posterior, left) = coarse_grid(scan)
    body = np.stack([ndimage.binary_fill_holes(plane) for plane in body_mask(hu)])
    return body, np.stack(np.meshgrid(superior, posterior, left, indexing="ij"))[::-1]


def within(inside: Inside, point: tuple[float, float, float]) -> bool:
    """Return whether a point (LPS mm) is in the body or enclosed by it, on the coarse grid; True without a body."""
    body, points = inside
    if not body.any():
        return True
    distance = ((points - np.array(point).reshape(3, 1, 1, 1)) ** 2).sum(axis=0)
    return bool(body.ravel()[int(distance.argmin())])


def peak_within(inside: Inside, found: Volume) -> tuple[float, float, float] | None:
    """Return the position (LPS mm) of a map's maximum inside the body, on a 4 mm grid, or None if it is 0 there."""
    body, points = inside
    values = np.where(body, sample(found, points, outside=0.0), 0.0)
    if not values.max() > 0:
        return None
    left, posterior, superior = points.reshape(3, -1)[:, int(values.argmax())]
    return float(left), float(posterior), float(superior)


def _pictures(
    scan: Volume,
    found: Volume | None,
    planes: tuple[Plane, ...],
    point: tuple[float, float, float],
    body: Box,
    soft: bool,
) -> list[tuple[str, Picture]]:
    shown = []
    for plane in planes:
        heat = ""
        if found is not None:
            top = float(found.voxels.max())
            heat = colour(sample_plane(found, plane, point, body, outside=0.0) / np.float32(top))
        hu = sample_plane(scan, plane, point, body)
        title = f"{PLANES[plane]}, {'soft tissue' if soft else 'lung window'}"
        window = SOFT_WINDOW if soft else LUNG_WINDOW
        shown.append((title, slice_picture(hu, window, plane, point, body, heat)))
    return shown


def colour(values: NDArray[np.float32]) -> str:
    """Return a plane (rows, columns) of values, relative to the map's maximum, as a PNG data URI in the ramp's colours.

    The colours are eight bands of equal width from `FLOOR` to 1, with increasing opacity; lower values are transparent.
    """
    from PIL import Image

    bands = np.floor((values - FLOOR) / (1 - FLOOR) * len(RAMP)).clip(-1, len(RAMP) - 1).astype(np.int64) + 1
    image = Image.fromarray(bands.astype(np.uint8))
    image.putpalette(bytes([0, 0, 0]) + b"".join(bytes.fromhex(one[1:]) for one in RAMP))
    alphas = np.linspace(*OPACITY, len(RAMP)) * 255
    data = io.BytesIO()
    image.save(data, "PNG", transparency=bytes([0, *(round(alpha) for alpha in alphas)]), optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")
