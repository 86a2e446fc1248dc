"""Saliency maps over slices: where `RUN/saliency/` keeps them, the planes through a map's peak, and their colours."""

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
# Viridis (Smith and van der Walt 2015): lightness grows evenly, also for colour-blind eyes and in grey print.
RAMP = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
FLOOR = 0.2
"""Values below this share of the map's largest are left clear."""
OPACITY = (0.35, 0.65)
SOFT_REGIONS = ("heart", "mediastinum", "pericardium", "vessels", "diaphragm", "bones", "thorax")
PLANES: dict[Plane, str] = {"axial": "Axial", "coronal": "Coronal", "sagittal": "Sagittal"}

Key = tuple[str, str, str]
"""Model (`zero_shot`, `classifier`), study, finding."""


@dataclass(frozen=True)
class Shown:
    """Slices of one scan with what a model used for one finding.

    Attributes:
        pictures: (title, picture) each.
        method: `grad-cam` or `gradient`; "" where there is no map and the slices go through the lungs.
        problem: why there are no pictures, or no map, or what is odd about it; else "".
    """

    pictures: tuple[tuple[str, Picture], ...]
    method: str
    problem: str = ""


def map_file(model: str, study: str, finding: str) -> str:
    """Where a map lies below `RUN/saliency/`: two studies, or findings that differ in a letter, never share a file."""

    def part(name: str) -> str:
        slug = re.sub(r"[^\w.-]", "_", name).strip(".")
        return slug if slug == name else f"{slug}-{hash_json(name)[:8]}"

    return f"{model}/{part(study)}/{part(finding.replace(' ', '_'))}.nii.gz"


def read_record(run: Path) -> dict[Key, dict[str, Any]]:
    """The maps that `RUN/saliency/saliency.json` lists; {} where there are none."""
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
    """Slices through the peak of a map with the map over them; without one, through the lungs, plain.

    Args:
        run: the run folder.
        record: of `read_record`.
        key: which map.
        scan: in HU, on its own grid.
        planes: to show.
        region: of the finding; of a soft one the soft-tissue window is shown, else the lung window.
    """
    soft = region in SOFT_REGIONS
    body, point = find_lungs(scan)
    one, trouble = record.get(key), "No saliency map was made of this one: the slices go through the lungs."
    found: Volume | None = None
    if one is not None:
        try:
            found = read_volume(run / FOLDER / str(one["file"]))
            if found.voxels.shape != scan.voxels.shape or not np.allclose(found.affine_lps, scan.affine_lps, atol=1e-2):
                found, trouble = None, "The saliency map is not of this scan's grid and is not shown."
            elif not found.voxels.max() > 0:
                found, trouble = None, "The saliency map is 0 everywhere: nothing in the scan spoke for the finding."
        except (OSError, ValueError, KeyError) as error:
            found, trouble = None, f"The saliency map could not be read: {error}"
    if found is None:
        return Shown(tuple(_pictures(scan, None, planes, point, body, soft)), "", trouble)
    point, note = peak(found), ""
    inside = _inside(scan)
    if not within(inside, point):
        inner = peak_within(inside, found)
        told = "; the slices go through its largest inside." if inner else "."
        point, note = inner or point, f"The map's largest value lies outside of the body{told}"
    body = _holding(body, point)
    return Shown(tuple(_pictures(scan, found, planes, point, body, soft)), str((one or {}).get("method", "")), note)


def _holding(box: Box, point: tuple[float, float, float]) -> Box:
    """The box, grown where the point lies outside of it."""
    low = [min(a, b) for a, b in zip(box.low, point, strict=True)]
    high = [max(a, b) for a, b in zip(box.high, point, strict=True)]
    return Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))


def peak(found: Volume) -> tuple[float, float, float]:
    """The (Left, Posterior, Superior) mm of a map's largest voxel; of equal ones the middle one in the file's order."""
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
    """Whether the coarse voxel nearest to a point (LPS mm) is of the body or enclosed by it; True where there is no body."""
    body, points = inside
    if not body.any():
        return True
    distance = ((points - np.array(point).reshape(3, 1, 1, 1)) ** 2).sum(axis=0)
    return bool(body.ravel()[int(distance.argmin())])


def peak_within(inside: Inside, found: Volume) -> tuple[float, float, float] | None:
    """Where in the body, every 4 mm, a map is largest (LPS mm); None where it is 0 throughout."""
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
    """A plane (rows, columns) of shares of a map's largest value as a PNG data URI in the ramp's colours.

    Eight bands of equal width from `FLOOR` to 1, the more opaque the higher; clear below.
    """
    from PIL import Image

    bands = np.floor((values - FLOOR) / (1 - FLOOR) * len(RAMP)).clip(-1, len(RAMP) - 1).astype(np.int64) + 1
    image = Image.fromarray(bands.astype(np.uint8))
    image.putpalette(bytes([0, 0, 0]) + b"".join(bytes.fromhex(one[1:]) for one in RAMP))
    alphas = np.linspace(*OPACITY, len(RAMP)) * 255
    data = io.BytesIO()
    image.save(data, "PNG", transparency=bytes([0, *(round(alpha) for alpha in alphas)]), optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")
