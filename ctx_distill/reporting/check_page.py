"""The page of `ctx-distill check`: counts, properties of the images, and suspicious images."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from ctx_distill.data.quality.faults import Fault
from ctx_distill.data.quality.scan import HISTOGRAM
from ctx_distill.files import write_text
from ctx_distill.reporting.run_page import TEMPLATES
from ctx_distill.reporting.svg import Scale
from ctx_distill.run_files import PAGE

SHOWN = 24
"""Maximum images per kind of fault on the page; the table has all."""

EXPLAINED = {
    "unreadable": "the file cannot be read",
    "slope_twice": "rescale intercept applied twice",
    "slope_missing": "rescale intercept not applied",
    "not_hu": "values are not Hounsfield units",
    "empty": "nearly constant values",
    "blank_slices": "constant slices: truncated or padded",
    "duplicate": "the same voxels under another id",
    "prepared": "the prepared item is missing, stale or corrupt",
    "lung_missing": "one lung or none",
    "spacing": "unusual voxel spacing",
    "extent": "unusual size: incomplete chest, or another unit",
    "orientation": "axes not aligned with the patient",
    "reader": "the reader had to guess",
    "polarity": "the film may be inverted",
    "small": "few pixels",
    "no_text": "neither findings nor impression",
    "identical_text": "a long report that is identical to other patients'",
    "label_contradicts_text": "label 1 that the report denies, or label 0 that it asserts",
    "text_date": "a date in the report",
    "text_name": "a name in the report",
    "text_number": "a number or address of a person in the report",
}


@dataclass
class CheckPage:
    """The contents of the page, collected row by row in bounded memory.

    Attributes:
        manifest: Path of the manifest.
        images: Number of images.
    """

    manifest: str
    images: int
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    with_severity: Counter[str] = field(default_factory=Counter)
    orientations: Counter[str] = field(default_factory=Counter)
    spacings: list[tuple[float, float, float]] = field(default_factory=list)
    shown: dict[tuple[str, str], list[dict[str, str]]] = field(default_factory=dict)
    histogram: NDArray[np.float64] = field(default_factory=lambda: np.zeros(HISTOGRAM[2]))
    scans: int = 0

    def add(
        self, image: str, path: str, facts: dict[str, Any], faults: Sequence[Fault], thumbnail: Path | None
    ) -> None:
        """Count one image, and keep the first images of each kind of fault."""
        kinds: set[tuple[str, str]] = {(fault.severity, fault.code) for fault in faults}
        self.counts.update(kinds)
        self.with_severity.update({severity for severity, _ in kinds})
        if "histogram" in facts:
            self.histogram += np.array(facts["histogram"])
            self.scans += 1
            self.orientations[facts["orientation"]] += 1
            self.spacings.append(tuple(facts["spacing_mm"]))
        for fault in faults:
            kept = self.shown.setdefault((fault.severity, fault.code), [])
            if fault.severity != "note" and self.wants(fault):
                picture = ""
                if thumbnail is not None and thumbnail.is_file():
                    picture = "data:image/jpeg;base64," + base64.b64encode(thumbnail.read_bytes()).decode("ascii")
                kept.append({"image": image, "path": path, "text": fault.text, "picture": picture})

    def wants(self, fault: Fault) -> bool:
        """Return whether the page can show another image of this kind of fault."""
        return len(self.shown.get((fault.severity, fault.code), [])) < SHOWN

    def counted(self) -> list[tuple[tuple[str, str], int]]:
        """Return the kinds of faults with their counts, by severity, then by descending count."""
        order = {"error": 0, "warning": 1, "note": 2}
        return sorted(self.counts.items(), key=lambda item: (order[item[0][0]], -item[1], item[0][1]))


def build_check_page(out: Path, page: CheckPage) -> Path:
    """Write `OUT/index.html`, a self-contained file, and return its path."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    sections = [
        {"severity": severity, "code": code, "title": EXPLAINED.get(code, code), "count": count,
         "images": page.shown.get((severity, code), [])}
        for (severity, code), count in page.counted()
    ]  # fmt: skip
    text = environment.get_template("check.html.j2").render(
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")), page=page, sections=sections,
        histogram=Markup(_histogram(page)) if page.scans else "", geometry=_geometry(page),
    )  # fmt: skip
    path = out / PAGE
    write_text(path, text)
    return path


def _geometry(page: CheckPage) -> list[tuple[str, str, str, str]]:
    """Return min, median and max spacing of the finest, middle and coarsest axis."""
    if not page.spacings:
        return []
    ranked = np.sort(np.array(page.spacings), axis=1)
    rows = []
    for i, name in enumerate(("finest axis", "middle axis", "coarsest axis")):
        low, median, high = (f"{value:.2f}" for value in np.percentile(ranked[:, i], (0, 50, 100)))
        rows.append((name, low, median, high))
    return rows


def _histogram(page: CheckPage) -> str:
    """Return a histogram of the mean share of voxels per bin, with tissue names."""
    low, high, bins = HISTOGRAM
    share = page.histogram / page.scans
    width, height, bottom = 720.0, 220.0, 184.0
    across, up = Scale(low, high, 36.0, width - 8.0), Scale(0.0, float(share.max()), bottom, 12.0)
    step = (high - low) / bins
    bars = "".join(
        f'<rect x="{across.position(low + i * step):g}" y="{up.position(value):g}" width="{across.position(low + (i + 1) * step) - across.position(low + i * step) - 1:.2f}"'
        f' height="{max(0.0, bottom - up.position(value)):.2f}" fill="var(--s0)"><title>{low + i * step:g} to {low + (i + 1) * step:g} HU:'
        f" {value:.1%}</title></rect>"
        for i, value in enumerate(share)
    )
    ticks = "".join(
        f'<text class="tick" x="{across.position(v):g}" y="{bottom + 16:g}" text-anchor="middle">{v:g}</text>'
        for v in (-1000, -500, 0, 500, 1000, 2000, 3000)
    )
    words = "".join(
        f'<text class="tick" x="{across.position(v):g}" y="{bottom + 32:g}" text-anchor="middle">{word}</text>'
        for v, word in ((-1000, "air"), (40, "soft tissue"), (1000, "bone"), (3000, "metal"))
    )
    return (
        f'<svg class="plot wide" viewBox="0 0 {width:g} {height + 4:g}" role="img" aria-label="Mean histogram of Hounsfield units">'
        f'{bars}<line class="axis" x1="36" x2="{width - 8:g}" y1="{bottom:g}" y2="{bottom:g}"/>{ticks}{words}</svg>'
    )
