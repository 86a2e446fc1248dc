"""Write results as the files that the page fetches: result.json, scan.nii, saliency-<n>.nii and xray-<n>.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctx_distill.data.io.volume import Volume
from ctx_distill.data.io.write_nifti import write_nifti
from ctx_distill.explorer.answers import Answer, FindingAnswer, SaliencyMap
from ctx_distill.files import write_bytes, write_json

RESULT = "result.json"
SCAN = "scan.nii"


def write_scan(folder: Path, scan: Volume, display_mvoxels: float) -> dict[str, Any]:
    """Write the scan for the page, as int16, subsampled to at most `display_mvoxels` million voxels.

    Returns:
        `voxels`, `spacing` (mm) and `steps` (1: every voxel) along x, y, z, the stored grid's fastest axis first.
    """
    steps = thinning(scan.voxels.shape, display_mvoxels)
    voxels = scan.voxels[tuple(slice(None, None, step) for step in steps)]
    affine = scan.affine_lps @ np.diag([*steps, 1.0])
    write_nifti(folder / SCAN, np.clip(np.rint(voxels), -32768, 32767).astype(np.int16), affine)
    return {
        "voxels": list(scan.voxels.shape[::-1]),
        "spacing": [round(s, 3) for s in scan.spacing[::-1]],
        "steps": list(steps[::-1]),
    }


def thinning(shape: tuple[int, ...], mvoxels: float) -> list[int]:
    """Return a step per axis so that at most `mvoxels` million voxels remain; the longest axis is subsampled first."""
    steps = [1] * len(shape)
    while np.prod([-(-n // step) for n, step in zip(shape, steps)]) > mvoxels * 1e6:
        longest = int(np.argmax([n / step for n, step in zip(shape, steps)]))
        steps[longest] += 1
    return steps


def write_answer(folder: Path, scan: Volume, answer: Answer, facts: dict[str, Any]) -> None:
    """Write the result files, and last `result.json`, which refers to them."""
    findings = sorted(answer.findings, key=lambda finding: -finding.value)
    outside: dict[bytes, NDArray[np.bool_]] = {}
    neighbours: list[dict[str, Any]] | None = None
    if answer.neighbours is not None:
        neighbours = []
        for number, one in enumerate(answer.neighbours):
            if one.picture is not None:
                write_bytes(folder / f"xray-{number}.png", one.picture)
            neighbours.append(
                {
                    "similarity": one.similarity,
                    "findings": one.findings,
                    "study_id": one.study_id,
                    "report": one.report,
                    "picture": one.picture is not None,
                }
            )
    write_json(
        folder / RESULT,
        {
            "scan": facts,
            "findings": [_finding(folder, scan, number, one, outside) for number, one in enumerate(findings)],
            "report": answer.report,
            "neighbours": neighbours,
            "notes": answer.notes,
        },
    )


def _finding(
    folder: Path, scan: Volume, number: int, finding: FindingAnswer, outside: dict[bytes, NDArray[np.bool_]]
) -> dict[str, Any]:
    place, saliency = None, finding.saliency
    if saliency is not None:
        grid = saliency.affine_lps.tobytes()  # the same for all findings of a scan
        if grid not in outside:
            outside[grid] = beyond(scan, saliency)
        values = np.where(outside[grid], np.float32(0), saliency.values)
        peak = float(values.max())
        if peak > 0:
            place = where(scan, SaliencyMap(values, saliency.affine_lps))
            write_nifti(
                folder / f"saliency-{number}.nii", np.rint(values * (255 / peak)).astype(np.uint8), saliency.affine_lps
            )
    return {"name": finding.name, "value": finding.value, "place": place}


def beyond(scan: Volume, saliency: SaliencyMap) -> NDArray[np.bool_]:
    """Return which positions of a map are outside the scan, where the model's input is padded with air."""
    to_scan = np.linalg.inv(scan.affine_lps) @ saliency.affine_lps
    d, h, w = (np.arange(n, dtype=np.float32) for n in saliency.values.shape)
    out = np.zeros(saliency.values.shape, dtype=np.bool_)
    for row, count in zip(to_scan[:3].astype(np.float32), scan.voxels.shape):
        index = row[0] * d[:, None, None] + row[1] * h[:, None] + row[2] * w + row[3]
        out |= (index < -0.5) | (index > count - 0.5)
    return out


def where(scan: Volume, saliency: SaliencyMap) -> dict[str, Any]:
    """Return the position of the map's peak.

    Returns:
        `mm`: the point in RAS mm, as NiiVue expects; `words`: side, level and depth within the scan.
    """
    peak = np.unravel_index(int(np.argmax(saliency.values)), saliency.values.shape)
    point = saliency.affine_lps @ np.array([*peak, 1.0])
    low, high = box(scan.voxels.shape, scan.affine_lps)
    left, posterior, superior = (point[:3] - low) / np.maximum(high - low, 1e-6)
    # Within a tenth around the middle, the side would be a guess.
    side = "midline" if abs(left - 0.5) < 0.05 else "patient's left" if left > 0.5 else "patient's right"
    level = "upper" if superior > 2 / 3 else "middle" if superior > 1 / 3 else "lower"
    depth = "front" if posterior < 1 / 3 else "centre" if posterior < 2 / 3 else "back"
    return {
        "mm": [round(float(v), 2) for v in (-point[0], -point[1], point[2])],
        "words": f"{side}, {level} third of the scan, {depth}",
    }


def box(shape: tuple[int, ...], affine: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the minimum and maximum LPS mm of a grid's voxel centres."""
    ends = np.array(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij")).reshape(3, -1)
    corners = affine[:3, :3] @ ends + affine[:3, 3:]
    return corners.min(axis=1), corners.max(axis=1)
