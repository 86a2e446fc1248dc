"""Images of the page, as data URIs: CT slices in radiological orientation, and radiographs.

A slice is sampled directly from the scan's grid through its affine, with square pixels in mm. So it is oriented correctly
for any axis order, including oblique scans, thick slices keep their proportions, and only one plane is resampled.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ctx_distill.data.transforms.coarse import (
    AIR,
    COARSE_MM,
    LUNG_HU,
    Box,
    body_mask,
    coarse_grid,
    enclosed,
    sample,
    scan_box,
)

if TYPE_CHECKING:
    from ctx_distill.data.io.volume import Volume

Plane = Literal["axial", "coronal", "sagittal"]
Floats = NDArray[np.float32]

LUNG_WINDOW = (-1350.0, 150.0)
SOFT_WINDOW = (-160.0, 240.0)
MAX_PIXELS = 400
JPEG_QUALITY = 84
THUMBNAIL_PIXELS = 280

# Patient axis (0 Left, 1 Posterior, 2 Superior; the affine's) and direction of a picture's columns and rows, and the
# letters at its left, right, top and bottom.
_LAYOUT: dict[Plane, tuple[tuple[int, int], tuple[int, int], str]] = {
    "axial": ((0, 1), (1, 1), "RLAP"),
    "coronal": ((0, 1), (2, -1), "RLSI"),
    "sagittal": ((1, 1), (2, -1), "APSI"),
}


@dataclass(frozen=True)
class Picture:
    """An image for the page.

    Attributes:
        uri: `data:` URI.
        width: Pixels.
        height: Pixels.
        letters: Patient directions at its left, right, top and bottom edge; "" for radiographs.
        crossings: Positions of the other planes, relative to (width, height); None for radiographs.
        heat: `data:` URI of a saliency map of the same extent; "" without one.
    """

    uri: str
    width: int
    height: int
    letters: str = ""
    crossings: tuple[float, float] | None = None
    heat: str = ""


@dataclass(frozen=True)
class CTPictures:
    """The slices of a CT."""

    axial: Picture
    axial_soft: Picture
    coronal: Picture
    sagittal: Picture


def ct_pictures(volume: Volume) -> CTPictures:
    """Return three orthogonal slices through the lungs, the axial one also in a soft-tissue window."""
    body, point = find_lungs(volume)
    planes: dict[Plane, Floats] = {plane: sample_plane(volume, plane, point, body) for plane in _LAYOUT}
    return CTPictures(
        axial=slice_picture(planes["axial"], LUNG_WINDOW, "axial", point, body),
        axial_soft=slice_picture(planes["axial"], SOFT_WINDOW, "axial", point, body),
        coronal=slice_picture(planes["coronal"], LUNG_WINDOW, "coronal", point, body),
        sagittal=slice_picture(planes["sagittal"], LUNG_WINDOW, "sagittal", point, body),
    )


def find_lungs(volume: Volume) -> tuple[Box, tuple[float, float, float]]:
    """Return the box around the body, and the (Left, Posterior, Superior) mm of the planes with the most lung.

    Lung is air that does not touch the border of its axial slice. If there is none, as in a scan cropped to one lung, all
    air is used; without air, the middle of the body.
    """
    from scipy import ndimage

    extent = scan_box(volume)
    hu, (superior, posterior, left) = coarse_grid(volume)
    tissue = body_mask(hu)
    body = _bounds(tissue, (superior, posterior, left), extent) if tissue.any() else extent

    air = (hu < LUNG_HU) & (hu > AIR + 1)
    lung = enclosed(hu < LUNG_HU) & air
    if lung.sum() < 0.02 * max(1, int(tissue.sum())):
        lung = air
    if not lung.any():
        middle = tuple((low + high) / 2 for low, high in zip(body.low, body.high, strict=True))
        return body, (middle[0], middle[1], middle[2])

    def most(axis: NDArray[np.float64], others: tuple[int, int]) -> float:
        return float(axis[int(ndimage.gaussian_filter1d(lung.sum(axis=others).astype(float), 2.0).argmax())])

    return body, (most(left, (0, 1)), most(posterior, (0, 2)), most(superior, (1, 2)))


def _bounds(mask: NDArray[np.bool_], axes: tuple[NDArray[np.float64], ...], extent: Box) -> Box:
    """Return the box around a mask (z, y, x) with a margin of 8 mm, within the scan, at the scan's full height."""
    low, high = list(extent.low), list(extent.high)
    for patient_axis, array_axis in ((0, 2), (1, 1)):
        others = tuple(a for a in range(3) if a != array_axis)
        inside = axes[array_axis][mask.any(axis=others)]
        low[patient_axis] = max(extent.low[patient_axis], float(inside[0]) - 8.0 - COARSE_MM / 2)
        high[patient_axis] = min(extent.high[patient_axis], float(inside[-1]) + 8.0 + COARSE_MM / 2)
    return Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))


def sample_plane(
    volume: Volume, plane: Plane, point: tuple[float, float, float], box: Box, outside: float = AIR
) -> Floats:
    """Return a plane through `point` in display orientation: row 0 on top, column 0 on the left, square pixels, HU.

    Axial: the patient's right on the left and anterior on top. Coronal: right on the left, superior on top. Sagittal:
    anterior on the left, superior on top.
    """
    (column_axis, column_sign), (row_axis, row_sign), _ = _LAYOUT[plane]
    pixel = max(0.6, max(box.high[axis] - box.low[axis] for axis in range(3)) / MAX_PIXELS)
    columns = _line(box, column_axis, column_sign, pixel)
    rows = _line(box, row_axis, row_sign, pixel)
    points = np.empty((3, len(rows), len(columns)))
    points[:] = np.array(point).reshape(3, 1, 1)
    points[column_axis] = columns[None, :]
    points[row_axis] = rows[:, None]
    return sample(volume, points, outside)


def _line(box: Box, axis: int, sign: int, pixel: float) -> NDArray[np.float64]:
    """Return pixel centres in mm along one side of the box, in display order."""
    count = max(1, round((box.high[axis] - box.low[axis]) / pixel))
    middle = (box.low[axis] + box.high[axis]) / 2
    centres = np.asarray(middle + (np.arange(count) - (count - 1) / 2) * pixel, dtype=np.float64)
    return centres[::sign]


def slice_picture(
    hu: Floats,
    window: tuple[float, float],
    plane: Plane,
    point: tuple[float, float, float],
    box: Box,
    heat: str = "",
) -> Picture:
    """Return a plane of `sample_plane` in a window; `heat` is the data URI of an overlay of the same extent."""
    grey = np.clip((hu - window[0]) / (window[1] - window[0]), 0.0, 1.0)
    (column_axis, column_sign), (row_axis, row_sign), letters = _LAYOUT[plane]

    def share(axis: int, sign: int) -> float:
        value = (point[axis] - box.low[axis]) / max(1e-6, box.high[axis] - box.low[axis])
        return value if sign > 0 else 1 - value

    crossings = (share(column_axis, column_sign), share(row_axis, row_sign))
    return Picture(encode(grey), hu.shape[1], hu.shape[0], letters, crossings, heat)


def xray_picture(path: Path, inverted: bool = False) -> Picture:
    """Return a radiograph, scaled down for the page; for `inverted`, see `read_radiograph`."""
    from PIL import Image

    from ctx_distill.data.io.radiograph import read_radiograph

    grey = np.clip(np.asarray(read_radiograph(path, inverted), dtype=np.float32), 0.0, 1.0)
    image = Image.fromarray((grey * 255).astype(np.uint8))
    image.thumbnail((MAX_PIXELS, MAX_PIXELS), Image.Resampling.LANCZOS)
    return Picture(encode(np.asarray(image, dtype=np.float32) / np.float32(255)), image.width, image.height)


def ct_thumbnail(volume: Volume) -> bytes:
    """Return an axial, a coronal and a sagittal slice side by side, in the lung window, as a JPEG."""
    body, point = find_lungs(volume)
    low, high = LUNG_WINDOW
    planes = [((sample_plane(volume, plane, point, body) - low) / (high - low)).clip(0, 1) for plane in _LAYOUT]
    height = max(plane.shape[0] for plane in planes)
    padded = [np.pad(plane, ((0, height - plane.shape[0]), (0, 4))) for plane in planes]
    return _thumbnail(np.concatenate(padded, axis=1), 2 * THUMBNAIL_PIXELS)


def film_thumbnail(film: Floats) -> bytes:
    """Return a radiograph (H, W) in [0, 1] as a small JPEG."""
    return _thumbnail(film, THUMBNAIL_PIXELS)


def _thumbnail(grey: Floats, longest: int) -> bytes:
    from PIL import Image

    image = Image.fromarray((grey * 255).round().astype(np.uint8))
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return jpeg(np.asarray(image, dtype=np.float32) / np.float32(255))


def encode(grey: Floats) -> str:
    """Return a grayscale image (rows, columns) in [0, 1] as a JPEG data URI."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(grey)).decode("ascii")


def jpeg(grey: Floats) -> bytes:
    """Return a grayscale image (rows, columns) in [0, 1] as a JPEG."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray((grey * 255).round().astype(np.uint8)).save(data, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return data.getvalue()
