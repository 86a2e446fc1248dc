"""The section on few-shot probes: the curve of `ctx-distill probe`, from `RUN/probe/few_shot.csv`."""

from __future__ import annotations

from typing import Any

import pandas as pd
from markupsafe import Markup

from ctx_distill.reporting import svg
from ctx_distill.run_files import FEW_SHOT_CURVE
from ctx_distill.runs.run_reader import Run

FOLDER = "probe"
COLUMNS = (
    "shots", "findings", "patients", "seeds", "macro_auroc", "low", "high", "seeds_low", "seeds_high", "lowest_seed",
    "highest_seed",
)  # fmt: skip


def few_shot_part(run: Run) -> dict[str, Any] | None:
    """Return `plot` and `rows` for the template, or None if the run has no curve, or one of another format."""
    path = run.folder / FOLDER / FEW_SHOT_CURVE
    try:
        table = pd.read_csv(path, dtype={"shots": str})
    except (OSError, ValueError):
        return None
    if not set(COLUMNS) <= set(table.columns) or not len(table):
        return None
    rows = table[list(COLUMNS)].astype(object).where(table[list(COLUMNS)].notna(), None).to_dict("records")
    return {"plot": Markup(curve_plot(table)), "rows": rows}


def curve_plot(table: pd.DataFrame, style: str = "") -> str:
    """Return an SVG of macro AUROC with intervals over patients, by number of labels, with separate curves for k and shares.

    Args:
        table: a table with `COLUMNS`.
        style: a style element for a standalone image.
    """
    known = table[table["macro_auroc"].notna()].reset_index(drop=True)
    bounds = [0.5, 1.0, *known["low"], *known["high"]]
    ticks = svg.nice_ticks(min(bounds), max(bounds), 5)
    left, top, bottom, width = 60.0, 30.0, 250.0, 760.0
    pitch = (width - left - 14) / max(len(known), 1)
    y = svg.Scale(ticks[0], ticks[-1], bottom, top)
    parts = [style] if style else []
    for tick in ticks:
        parts.append(svg.line(left, y.position(tick), width - 14, y.position(tick), "grid"))
        parts.append(svg.text(left - 8, y.position(tick) + 4, svg.tick_text(tick, ticks[1] - ticks[0]), "tick", "end"))
    parts.append(svg.line(left, y.position(0.5), width - 14, y.position(0.5), "chance"))
    parts.append(svg.text(left - 8, 14, "test macro AUROC, 95 % intervals over patients; dotted: chance", "tick"))
    shares = known["shots"].astype(str).str.endswith("%")
    for number, own in enumerate((known[~shares], known[shares])):
        places = [left + pitch * (int(place) + 0.5) for place in own.index]
        parts.append(
            svg.polyline(
                [(x, y.position(v)) for x, v in zip(places, own["macro_auroc"], strict=True)], f"curve s{number}"
            )
        )
        for x, (_, row) in zip(places, own.iterrows(), strict=True):
            parts.append(svg.line(x, y.position(row["low"]), x, y.position(row["high"]), f"whisker s{number}"))
            parts.append(
                svg.marker(("dot", "square")[number], x, y.position(row["macro_auroc"]), f"mark s{number}", 4.5)
            )
            parts.append(svg.text(x, bottom + 18, str(row["shots"]), "tick", "middle"))
            parts.append(svg.text(x, bottom + 34, f"{row['findings']:g} findings", "tick", "middle"))
    words = "examples per class and finding, or % of the training patients"
    parts.append(svg.text((left + width) / 2, bottom + 54, words, "tick", "middle"))
    told = "; ".join(
        f"{row['shots']}: {row['macro_auroc']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for _, row in known.iterrows()
    )
    label = f"Test macro AUROC of a linear probe by labels, 95 % intervals over patients: {told or 'none defined'}"
    return svg.frame(width, bottom + 64, label, parts, "wide")
