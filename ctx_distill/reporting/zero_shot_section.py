"""The section on zero-shot: scores at thresholds, calibration, and retrieval between reports and volumes."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ctx_distill.metrics.report_retrieval import RANKS
from ctx_distill.reporting import svg
from ctx_distill.runs.metric_catalogue import FINDING_MEASURES
from ctx_distill.runs.run_reader import Metric, Run, mapping, to_metric, to_number


def zero_shot_part(run: Run) -> dict[str, Any] | None:
    """Return the template's variables, or None if the run has no such results or they have another format."""
    metrics = mapping(run.metrics.get("zero_shot"))
    findings = {name: mapping(own) for name, own in mapping(metrics.get("findings")).items()}
    rows = [
        (name, own.get("threshold"), own.get("threshold_reason"), [to_metric(own.get(key)) for key in FINDING_MEASURES])
        for name, own in sorted(findings.items())
    ]
    macro = mapping(metrics.get("macro"))
    if macro:
        rows.append(("Macro mean", None, None, [to_metric(macro.get(key)) for key in FINDING_MEASURES]))
    retrieval = mapping(metrics.get("retrieval"))
    directions = [
        (words, _recalls(mapping(retrieval.get(key))), to_metric(mapping(retrieval.get(key)).get("median_rank")))
        for key, words in (("report_to_volume", "Report to volume"), ("volume_to_report", "Volume to report"))
        if mapping(retrieval.get(key))
    ]
    if not rows and not directions:
        return None
    return {
        "columns": list(FINDING_MEASURES.values()),
        "rows": rows,
        "rule": metrics.get("threshold_rule"),
        "ranks": RANKS,
        "directions": directions,
        "studies": retrieval.get("studies"),
        "identical": retrieval.get("identical_reports"),
        "reliability": _reliability_plot(metrics.get("reliability")),
    }


def _recalls(found: dict[str, Any]) -> list[tuple[Metric | None, Metric | None]]:
    """Return recall@k and its chance level for each k."""
    return [
        (to_metric(found.get(f"recall_at_{k}")), to_metric(found.get(f"recall_at_{k}_random"))) for k in RANKS
    ]  # fmt: skip


def _reliability_plot(bins: object) -> Markup | None:
    """Return a plot of the share of studies with a finding over the predicted probability, for all findings."""
    points = []
    for item in bins if isinstance(bins, list) else []:
        held = mapping(item)
        predicted, observed, count = (to_number(held.get(key)) for key in ("probability", "frequency", "count"))
        if predicted is not None and observed is not None and count is not None:
            points.append((predicted, observed, int(count)))
    if not points:
        return None
    size, left, top, bottom = 300.0, 48.0, 10.0, 250.0
    x, y = svg.Scale(0, 1, left, size - 14), svg.Scale(0, 1, bottom, top)
    parts = []
    for value in (0.0, 0.5, 1.0):
        parts.append(svg.line(x.position(value), y.position(0), x.position(value), y.position(1), "grid"))
        parts.append(svg.line(x.position(0), y.position(value), x.position(1), y.position(value), "grid"))
        parts.append(svg.text(x.position(value), bottom + 16, f"{value:g}", "tick", "middle"))
        parts.append(svg.text(left - 6, y.position(value) + 3.5, f"{value:g}", "tick", "end"))
    parts.append(svg.line(x.position(0), y.position(0), x.position(1), y.position(1), "chance"))
    pixels = [(x.position(predicted), y.position(observed)) for predicted, observed, _ in points]
    parts.append(svg.polyline(pixels, "curve s0"))
    parts.extend(svg.marker("dot", across, down, "mark s0", 4) for across, down in pixels)
    parts.append(svg.text((x.position(0) + x.position(1)) / 2, bottom + 32, "predicted probability", "tick", "middle"))
    middle = (y.position(0) + y.position(1)) / 2
    turned = f'<g transform="rotate(-90 12 {middle:g})">'
    parts.append(turned + svg.text(12, middle, "share with the finding", "tick", "middle") + "</g>")
    values = "; ".join(
        f"predicted {predicted:.2f}, observed {observed:.2f}, {count} predictions"
        for predicted, observed, count in points
    )
    return Markup(svg.frame(size, 290, f"Reliability curve: {values}", parts, "small"))
