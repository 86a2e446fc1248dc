"""The part of the page on zero-shot: scores at thresholds, calibration, and retrieval between reports and volumes."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ctx_distill.metrics.report_retrieval import RANKS
from ctx_distill.reporting import svg
from ctx_distill.runs.metric_catalogue import FINDING_MEASURES
from ctx_distill.runs.run_reader import Metric, Run, mapping, to_metric, to_number


def zero_shot_part(run: Run) -> dict[str, Any] | None:
    """What the template shows; None where the run has none of it, also where its files have another form."""
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
    """(recall@k, by chance) for each rank."""
    return [
        (to_metric(found.get(f"recall_at_{k}")), to_metric(found.get(f"recall_at_{k}_random"))) for k in RANKS
    ]  # fmt: skip


def _reliability_plot(bins: object) -> Markup | None:
    """Share of studies with a finding over the probability given, all findings together."""
    points = []
    for item in bins if isinstance(bins, list) else []:
        held = mapping(item)
        given, seen, count = (to_number(held.get(key)) for key in ("probability", "frequency", "count"))
        if given is not None and seen is not None and count is not None:
            points.append((given, seen, int(count)))
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
    parts.append(svg.polyline([(x.position(given), y.position(seen)) for given, seen, _ in points], "curve s0"))
    parts.extend(svg.marker("dot", x.position(given), y.position(seen), "mark s0", 4) for given, seen, _ in points)
    parts.append(svg.text((x.position(0) + x.position(1)) / 2, bottom + 32, "probability given", "tick", "middle"))
    middle = (y.position(0) + y.position(1)) / 2
    turned = f'<g transform="rotate(-90 12 {middle:g})">'
    parts.append(turned + svg.text(12, middle, "share with the finding", "tick", "middle") + "</g>")
    told = "; ".join(f"given {given:.2f}, seen {seen:.2f}, {count} answers" for given, seen, count in points)
    return Markup(svg.frame(size, 290, f"Reliability curve: {told}", parts, "small"))
