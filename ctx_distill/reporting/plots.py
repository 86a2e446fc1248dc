"""The plots of the page, as inline SVG: intervals per finding, learning curves and ROC curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ctx_distill.reporting import svg
from ctx_distill.runs.run_reader import Metric

MAX_POINTS = 160


@dataclass(frozen=True)
class Curve:
    """Train and validation values of one logged term: (x, y) points each, x an epoch or a step."""

    term: str
    unit: str
    train: tuple[tuple[float, float], ...]
    val: tuple[tuple[float, float], ...]

    @property
    def is_flat(self) -> bool:
        """Whether the curve has several points and each series is constant."""
        several = len(self.train) > 1 or len(self.val) > 1
        return several and all(len({y for _, y in series}) <= 1 for series in (self.train, self.val))


@dataclass(frozen=True)
class Roc:
    """A ROC curve: false and true positive rates, the area under the curve, and the number of each class."""

    false_positive_rate: NDArray[np.float64]
    true_positive_rate: NDArray[np.float64]
    auroc: float
    positives: int
    negatives: int


def roc(labels: NDArray[np.float64], scores: NDArray[np.float64]) -> Roc | None:
    """Return the ROC curve of labels (N,) and scores (N,), ignoring other labels than 1 and 0 and blank scores.

    Returns None if one of the classes is missing.
    """
    known = np.isin(labels, (0.0, 1.0)) & np.isfinite(scores)
    truth, score = labels[known] == 1, scores[known]
    positives = int(truth.sum())
    negatives = int(len(truth) - positives)
    if not positives or not negatives:
        return None
    order = np.argsort(-score, kind="stable")
    truth, score = truth[order], score[order]
    # Studies of equal score form one step, whatever their order in the file.
    last = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
    rate_true = np.concatenate([[0.0], np.cumsum(truth)[last] / positives])
    rate_false = np.concatenate([[0.0], np.cumsum(~truth)[last] / negatives])
    area = float(np.trapezoid(rate_true, rate_false))
    return Roc(rate_false, rate_true, area, positives, negatives)


def interval_plot(rows: Sequence[tuple[str, Sequence[Metric | None]]], series: Sequence[str], chance: float) -> str:
    """Return a plot with a dot and an interval per finding and series.

    Args:
        rows: Name and one metric per series, in order from the top.
        series: Names of the series.
        chance: Position of the dotted line of chance.
    """
    values = [
        item for _, metrics in rows for m in metrics if m for item in (m.value, m.low, m.high) if item is not None
    ]
    low = min([0.3, *values])
    low = max(0.0, np.floor(low * 10) / 10)
    pitch = max(26, 8 + 12 * len(series))
    left, right, top, width = 190.0, 20.0, 10.0, 760.0
    bottom = top + pitch * len(rows)
    x = svg.Scale(low, 1.0, left, width - right)
    parts = []
    for index in range(round(low * 10), 11):
        value = index / 10
        parts.append(svg.line(x.position(value), top, x.position(value), bottom, "grid"))
        parts.append(svg.text(x.position(value), bottom + 17, f"{value:.1f}", "tick", "middle"))
    parts.append(svg.line(x.position(chance), top, x.position(chance), bottom, "chance"))
    for index, (name, metrics) in enumerate(rows):
        middle = top + pitch * (index + 0.5)
        parts.append(svg.text(left - 12, middle + 4.5, shorten(name, 26), "label", "end"))
        for number, metric in enumerate(metrics):
            y = middle + (number - (len(series) - 1) / 2) * 12
            if metric is None or metric.value is None:
                continue
            if metric.low is not None and metric.high is not None:
                parts.append(svg.line(x.position(metric.low), y, x.position(metric.high), y, f"whisker s{number}"))
            parts.append(svg.marker(SHAPES[number], x.position(metric.value), y, f"mark s{number}", 4.5))
    label = f"AUROC of {len(rows)} findings with 95 % intervals ({', '.join(series)}); the numbers are in the table"
    return svg.frame(width, bottom + 26, label, parts, "wide")


SHAPES = ("dot", "square", "triangle", "diamond", "cross", "ring")


def legend_key(number: int) -> str:
    """Return the line and mark of a series for a legend."""
    mark = svg.marker(SHAPES[number], 11, 6, f"mark s{number}", 3.4)
    return f'<svg class="key" viewBox="0 0 22 12" aria-hidden="true">{svg.line(0, 6, 22, 6, f"curve s{number}")}{mark}</svg>'


def shorten(words: str, length: int) -> str:
    """Return the words, shortened to `length` with an ellipsis."""
    return words if len(words) <= length else words[: length - 1].rstrip() + "…"


def learning_curves(log: pd.DataFrame) -> list[Curve]:
    """Return one curve per logged term of a CSVLogger file: the loss first, then terms with both series.

    Values are averaged by epoch; with fewer than three epochs, the x axis is the step.
    """
    terms: dict[str, dict[str, str]] = {}
    for column in log.columns:
        part, slash, term = str(column).partition("/")
        if slash and part in ("train", "val"):
            base = term.removesuffix("_epoch").removesuffix("_step")
            if base == "total" and f"{part}/loss" not in log.columns:
                base = "loss"  # A task that logs its weighted sum as the total of its terms.
            held = terms.setdefault(base, {})
            # For terms that are logged both per step and per epoch, the epoch mean is enough.
            if part not in held or term.endswith("_epoch"):
                held[part] = str(column)
    unit = "epoch"
    if "epoch" not in log.columns or log["epoch"].nunique() < 3:
        unit = "step" if "step" in log.columns else "epoch"
    if unit not in log.columns:
        return []
    curves = [
        Curve(term, unit, _points(log, unit, held.get("train")), _points(log, unit, held.get("val")))
        for term, held in terms.items()
    ]
    curves = [curve for curve in curves if curve.train or curve.val]
    return sorted(curves, key=lambda c: (c.term != "loss", "loss" not in c.term, not (c.train and c.val), c.term))


def _points(log: pd.DataFrame, unit: str, column: str | None) -> tuple[tuple[float, float], ...]:
    """Return (x, mean y) of a column, finite values only, averaged to at most about `MAX_POINTS` points."""
    if column is None:
        return ()
    numbers = log[[unit, column]].apply(pd.to_numeric, errors="coerce")
    numbers = numbers[np.isfinite(numbers).all(axis=1)]
    means = numbers.groupby(unit)[column].mean()
    stride = -(-len(means) // MAX_POINTS) if len(means) else 1
    groups = np.arange(len(means)) // stride
    xs = pd.Series(means.index.to_numpy(dtype=float)).groupby(groups).mean()
    ys = pd.Series(means.to_numpy(dtype=float)).groupby(groups).mean()
    return tuple((float(a), float(b)) for a, b in zip(xs, ys, strict=True))


def curve_plot(curve: Curve) -> str:
    """Return one small plot of a learning curve."""
    return series_plot(curve.term, curve.unit, (curve.train, curve.val), curve_words(curve))


def series_plot(
    term: str, unit: str, drawn: Sequence[Sequence[tuple[float, float]]], words: str, every: bool = False
) -> str:
    """Return a plot of several series of (x, y) points, each with its own dash and mark.

    Args:
        term: Name of the plotted term.
        unit: Unit of x.
        drawn: The series; an empty series keeps its style.
        words: The last values, in words.
        every: Also mark the points of the first series.
    """
    width, height, left, right, top, bottom = 260.0, 150.0, 44.0, 10.0, 8.0, 122.0
    xs = [x for series in drawn for x, _ in series]
    ys = [y for series in drawn for _, y in series]
    ticks = svg.nice_ticks(min(ys), max(ys))
    x = svg.Scale(min(xs), max(xs), left, width - right)
    y = svg.Scale(ticks[0], ticks[-1], bottom, top)
    parts = []
    for tick in ticks:
        parts.append(svg.line(left, y.position(tick), width - right, y.position(tick), "grid"))
        parts.append(
            svg.text(left - 6, y.position(tick) + 3.5, svg.tick_text(tick, ticks[1] - ticks[0]), "tick", "end")
        )
    parts.append(svg.text(x.position(min(xs)), height - 14, f"{min(xs):g}", "tick", "middle"))
    if max(xs) > min(xs):
        parts.append(svg.text(x.position(max(xs)), height - 14, f"{max(xs):g}", "tick", "middle"))
    parts.append(svg.text((left + width - right) / 2, height - 14, unit, "tick", "middle"))
    for number, series in enumerate(drawn):
        points = [(x.position(a), y.position(b)) for a, b in series]
        parts.append(svg.polyline(points, f"curve s{number}"))
        apart = max(1, len(points) // 8)
        shown = points[::apart] if number or every else (points if len(points) == 1 else [])
        parts.extend(svg.marker(SHAPES[number], a, b, f"mark s{number}", 2.6) for a, b in shown)
    return svg.frame(width, height, f"{term} by {unit}: {words}", parts, "small")


def curve_words(curve: Curve) -> str:
    """Return the last value of each series in words."""
    ends = [(name, series[-1][1]) for name, series in (("train", curve.train), ("val", curve.val)) if series]
    return ", ".join(f"{name} {value:.3g}" for name, value in ends)


def roc_plot(finding: str, curves: Sequence[Roc | None], names: Sequence[str]) -> str:
    """Return one small plot of ROC curves, with all series."""
    size, left, top, bottom = 210.0, 44.0, 8.0, 162.0
    x, y = svg.Scale(0, 1, left, size - 12), svg.Scale(0, 1, bottom, top)
    parts = [svg.line(x.position(0), y.position(0), x.position(1), y.position(1), "chance")]
    for value in (0.0, 0.5, 1.0):
        parts.append(svg.line(x.position(value), y.position(0), x.position(value), y.position(1), "grid"))
        parts.append(svg.line(x.position(0), y.position(value), x.position(1), y.position(value), "grid"))
        parts.append(svg.text(x.position(value), bottom + 15, f"{value:g}", "tick", "middle"))
        parts.append(svg.text(left - 6, y.position(value) + 3.5, f"{value:g}", "tick", "end"))
    parts.append(svg.text((x.position(0) + x.position(1)) / 2, bottom + 28, "false positive rate", "tick", "middle"))
    middle = (y.position(0) + y.position(1)) / 2
    turned = f'<g transform="rotate(-90 11 {middle:g})">'
    parts.append(turned + svg.text(11, middle, "true positive rate", "tick", "middle") + "</g>")
    told = []
    for number, curve in enumerate(curves):
        if curve is None:
            continue
        keep = np.unique(np.linspace(0, len(curve.false_positive_rate) - 1, 200).round().astype(int))
        rates = zip(curve.false_positive_rate[keep], curve.true_positive_rate[keep], strict=True)
        parts.append(svg.polyline([(x.position(float(a)), y.position(float(b))) for a, b in rates], f"curve s{number}"))
        told.append(f"{names[number]} {curve.auroc:.2f}")
    return svg.frame(size, 196, f"ROC curve of {finding}; area: {', '.join(told)}", parts, "small")
