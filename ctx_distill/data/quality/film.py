"""Check one radiograph."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctx_distill.data.io.radiograph import read_radiograph
from ctx_distill.data.quality.faults import Fault

_SMALL = 128
_INVERTED = 0.25


def check_film(path: Path, inverted: bool, frontal: bool) -> tuple[dict[str, Any], list[Fault], NDArray[np.float32]]:
    """Read and check a radiograph.

    Args:
        path: image file.
        inverted: as in the manifest.
        frontal: whether it is a frontal view, whose borders are darker than its centre.

    Returns:
        Facts as JSON values, faults, and the film (H, W) in [0, 1].

    Raises:
        InputError: as `read_radiograph`.
    """
    film = read_radiograph(path, inverted)
    height, width = film.shape
    border, middle = _border_and_middle(film)
    digest = hashlib.blake2b(repr(film.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(film).data)
    facts = {
        "shape": [height, width],
        "border": round(border, 3),
        "middle": round(middle, 3),
        "content": digest.hexdigest(),
    }
    faults = []
    if float(np.percentile(film, 99) - np.percentile(film, 1)) < 0.02:
        return facts, [Fault("error", "empty", "the film has a single grey value")], film
    if min(height, width) < _SMALL:
        faults.append(Fault("note", "small", f"{height} x {width} pixels"))
    if max(height, width) > 2.5 * min(height, width):
        faults.append(Fault("warning", "extent", f"{height} x {width} pixels; expected a complete film"))
    if frontal and border - middle > _INVERTED:
        text = f"the border is brighter than the centre ({border:.2f} and {middle:.2f}); check whether the film is inverted"
        faults.append(Fault("warning", "polarity", text))
    return facts, faults, film


def _border_and_middle(film: NDArray[np.float32]) -> tuple[float, float]:
    """Return the mean grey values of the upper corners (air beside the neck) and of the centre (mediastinum)."""
    height, width = film.shape
    rows, columns = max(1, height // 12), max(1, width // 12)
    corners = np.concatenate([film[:rows, :columns].ravel(), film[:rows, -columns:].ravel()])
    middle = film[height // 4 : height - height // 4, width * 3 // 8 : width - width * 3 // 8]
    return float(corners.mean()), float(middle.mean())
