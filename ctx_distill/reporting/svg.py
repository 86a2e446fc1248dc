"""SVG elements for the plots, as strings: scales, axes and paths.

Unlike matplotlib's output, text stays text in the page's font, colours follow the page's light and dark style sheet, a plot
takes a few kB, and the output is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Scale:
    """Linear map from data in [low, high] to pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def position(self, value: float) -> float:
        """Return the pixel of a value; values outside the range are clamped."""
        span = self.high - self.low
        share = 0.5 if span <= 0 else min(1.0, max(0.0, (value - self.low) / span))
        return round(self.start + share * (self.end - self.start), 2)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round numbers that cover [low, high]; the first is <= low and the last >= high."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_text(value: float, step: float) -> str:
    """Format a tick with as many decimals as the step needs."""
    if abs(value) >= 1e5 or (0 < abs(value) < 1e-2 and step < 1e-4):
        digits = max(0, math.floor(math.log10(abs(value))) - math.floor(math.log10(step)))
        return f"{value:.{digits}e}".replace("e-0", "e-").replace("e+0", "e")
    decimals = max(0, math.ceil(-math.log10(step) - 1e-9))
    if abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
        decimals += 1
    return f"{value:.{decimals}f}"


def text(x: float, y: float, words: str, css: str = "", anchor: str = "start") -> str:
    """Return a text element with escaped words."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{css}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """Return a straight line."""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{css}"/>'


def polyline(points: Iterable[tuple[float, float]], css: str) -> str:
    """Return points joined by lines."""
    joined = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{joined}" class="{css}"/>' if joined else ""


def marker(shape: str, x: float, y: float, css: str, size: float = 4.0) -> str:
    """Return a dot, square, triangle, diamond, cross or ring, so that series differ by more than colour."""
    if shape == "square":
        return f'<rect x="{x - size:g}" y="{y - size:g}" width="{2 * size:g}" height="{2 * size:g}" class="{css}"/>'
    if shape == "triangle":
        points = f"{x:g},{y - size - 1:g} {x - size - 0.5:g},{y + size:g} {x + size + 0.5:g},{y + size:g}"
        return f'<polygon points="{points}" class="{css}"/>'
    if shape == "diamond":
        reach = size + 1.2
        points = f"{x:g},{y - reach:g} {x + reach:g},{y:g} {x:g},{y + reach:g} {x - reach:g},{y:g}"
        return f'<polygon points="{points}" class="{css}"/>'
    if shape == "cross":
        path = (
            f"M{x - size:g} {y - size:g}L{x + size:g} {y + size:g}M{x - size:g} {y + size:g}L{x + size:g} {y - size:g}"
        )
        return f'<path d="{path}" class="{css} open"/>'
    if shape == "ring":
        return f'<circle cx="{x:g}" cy="{y:g}" r="{size:g}" class="{css} open"/>'
    return f'<circle cx="{x:g}" cy="{y:g}" r="{size:g}" class="{css}"/>'


def frame(width: float, height: float, label: str, parts: Sequence[str], css: str = "") -> str:
    """Return an inline SVG image with a text alternative."""
    body = "".join(parts)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, quote=True)}" '
        f'class="plot {css}">{body}</svg>'
    )
