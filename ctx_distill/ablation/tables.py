"""The ablation's table and plots: `docs/ablation.md` with its picture, and a page of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ctx_distill.ablation.analysis import Estimate, crossed, difference, holm
from ctx_distill.ablation.plan import CORE, Arm, Contrast, Plan, Regime
from ctx_distill.ablation.records import Records
from ctx_distill.files import write_text
from ctx_distill.reporting import svg

SECONDARY = {
    "probe_auroc_10": "probe 10 %",
    "probe_auroc_25": "probe 25 %",
    "probe_auroc_100": "probe 100 %",
    "report_recall_at_10": "report→CT R@10",
}
GROUPS = {
    "baseline": "Baselines",
    "paper": "The paper's parts",
    "ours": "With what is ours",
    "control": "Controls",
}


@dataclass(frozen=True)
class ArmRow:
    """An arm in a regime, on the primary metric, with its secondary means."""

    arm: Arm
    estimate: Estimate
    learning_rate: float
    secondary: dict[str, float]


@dataclass(frozen=True)
class ArmDifference:
    """A contrast's estimate; `adjusted` is Holm's p among the secondary ones, the raw p of a headline."""

    contrast: Contrast
    estimate: Estimate
    adjusted: float


def table_rows(plan: Plan, records: Records, regime: Regime) -> list[ArmRow]:
    """The arms of a regime that have been run, by group and in the plan's order."""
    rows = []
    for name in sorted(regime.arms, key=lambda name: list(GROUPS).index(plan.arms[name].group)):
        values = records.values(regime.name, name)
        if not values:
            continue
        secondary = {}
        for metric in SECONDARY:
            found = list(records.values(regime.name, name, metric).values())
            if found:
                secondary[metric] = sum(found) / len(found)
        chosen = records.rows[(records.rows["regime"] == regime.name) & (records.rows["arm"] == name)]
        rate = float(chosen["learning_rate"].iloc[0])
        rows.append(ArmRow(plan.arms[name], crossed(values, records.resampled(regime.name, name)), rate, secondary))
    return rows


def differences(plan: Plan, records: Records) -> list[ArmDifference]:
    """The protocol's contrasts whose arms have been run, headlines first."""
    found: list[tuple[Contrast, Estimate]] = []
    for contrast in plan.contrasts:
        values = tuple(records.values(contrast.regime, name) for name in (contrast.arm, contrast.against))
        if not (set(values[0]) & set(values[1]) or (values[0] and len(values[1]) == 1)):
            continue
        resampled = tuple(records.resampled(contrast.regime, name) for name in (contrast.arm, contrast.against))
        found.append((contrast, difference((values[0], values[1]), (resampled[0], resampled[1]))))
    secondary = {str(number): estimate.p for number, (contrast, estimate) in enumerate(found) if not contrast.headline}
    adjusted = holm(secondary)
    rows = [
        ArmDifference(contrast, estimate, adjusted.get(str(number), estimate.p))
        for number, (contrast, estimate) in enumerate(found)
    ]
    return sorted(rows, key=lambda row: not row.contrast.headline)


def show(estimate: Estimate, signed: bool = False) -> str:
    """`.731 [.702, .760]`."""
    form = "{:+.3f}" if signed else "{:.3f}"
    return f"{form.format(estimate.value)} [{form.format(estimate.low)}, {form.format(estimate.high)}]"


def markdown(plan: Plan, records: Records) -> str:
    """The tables of `docs/ablation.md`, between its markers."""
    parts = []
    for regime in plan.regimes.values():
        rows = table_rows(plan, records, regime)
        if not rows:
            continue
        parts += [f"\n### {_title(regime)}\n", _regime_table(rows, regime.name == CORE)]
    lines = ["| contrast | regime | difference [95 %] | p | seeds |", "| --- | --- | --- | --- | --- |"]
    for row in differences(plan, records):
        contrast = row.contrast
        name = f"{contrast.arm} − {contrast.against}"
        label = f"**{name}**" if contrast.headline else name
        p = f"{row.adjusted:.4f}" + ("" if contrast.headline else " (Holm)")
        lines.append(f"| {label} | {contrast.regime} | {show(row.estimate, True)} | {p} | {row.estimate.seeds} |")
    return "\n".join([*parts, "\n### Contrasts\n", *lines, ""])


def _title(regime: Regime) -> str:
    normals = "as the cohort comes" if regime.normals is None else f"{regime.normals:.0%}"
    return f"{regime.name}: {regime.pairs} pairs, {regime.pool:,} X-rays, expert {regime.expert}, normals {normals}"


def _regime_table(rows: Sequence[ArmRow], core: bool) -> str:
    shown = [metric for metric in SECONDARY if core and any(metric in row.secondary for row in rows)]
    head = ["arm", "", "macro AUROC [95 %]", "seeds", "lr", *(SECONDARY[metric] for metric in shown)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for group, title in GROUPS.items():
        of_group = [row for row in rows if row.arm.group == group]
        if of_group and core:
            lines.append(f"| *{title}* |" + " |" * (len(head) - 1))
        for row in of_group:
            rate = f"{row.learning_rate:g}" if row.arm.trains else "–"
            cells = [f"`{row.arm.name}`", row.arm.title, show(row.estimate), str(row.estimate.seeds), rate]
            cells += [f"{row.secondary[metric]:.3f}" if metric in row.secondary else "–" for metric in shown]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def forest_plot(rows: Sequence[ArmRow], label: str) -> str:
    """Dot and interval an arm: triangles are ours, squares the paper's, circles baselines and controls."""
    values = [end for row in rows for end in (row.estimate.low, row.estimate.high)]
    ticks = svg.nice_ticks(min(values), max(values), 5)
    left, top, pitch, width = 390.0, 8.0, 24, 900.0
    bottom = top + pitch * len(rows)
    x = svg.Scale(ticks[0], ticks[-1], left, width - 25)
    parts = []
    for tick in ticks:
        parts.append(svg.line(x.position(tick), top, x.position(tick), bottom, "grid"))
        parts.append(
            svg.text(x.position(tick), bottom + 17, svg.tick_text(tick, ticks[1] - ticks[0]), "tick", "middle")
        )
    shapes = {"baseline": "circle", "paper": "square", "ours": "triangle", "control": "circle"}
    for number, row in enumerate(rows):
        middle = top + pitch * (number + 0.5)
        css = {"ours": "s0", "paper": "s1"}.get(row.arm.group, "other")
        parts.append(svg.text(left - 12, middle + 4.5, row.arm.title, "label", "end"))
        parts.append(
            svg.line(x.position(row.estimate.low), middle, x.position(row.estimate.high), middle, f"whisker {css}")
        )
        parts.append(svg.marker(shapes[row.arm.group], x.position(row.estimate.value), middle, f"mark {css}"))
    return svg.frame(width, bottom + 26, label, parts)


_STYLE = """
svg{font:13px system-ui,sans-serif;background:#fff;color:#111}
.grid{stroke:#ddd}.tick,.label{fill:#222}.whisker{stroke-width:2}
.s0{stroke:#0072b2;fill:#0072b2}.s1{stroke:#c8641b;fill:#c8641b}.other{stroke:#555;fill:#555}
"""
BEGIN, END = "<!-- tables: written by `make ablation` -->", "<!-- end of the tables -->"


def write_report(plan: Plan, records: Records, run: Path, document: Path) -> Path:
    """Put the tables and the picture into the document, and write the page.

    Args:
        plan: the plan.
        records: what has been run.
        run: folder of the page.
        document: `docs/ablation.md`; what stands outside its markers is left as it is.

    Returns:
        The page's path.
    """
    tables = markdown(plan, records)
    text = document.read_text(encoding="utf-8") if document.is_file() else f"# The ablation\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    write_text(document, f"{before}{BEGIN}\n{tables}\n{END}{after}")
    core = table_rows(plan, records, plan.regimes[CORE])
    if core:
        picture = forest_plot(core, "Zero-shot macro AUROC of each arm with its 95 % interval")
        standing = picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        standing = standing.replace(">", f"><style>{_STYLE}</style>", 1)
        write_text(records.folder / "core.svg", standing)
    from ctx_distill.reporting.ablation_page import build_ablation_page

    return build_ablation_page(run, plan_summary(plan), page_tables(plan, records))


def plan_summary(plan: Plan) -> dict[str, str]:
    """What the page says of the plan."""
    return {
        "cohort": ", ".join(f"{name} {value}" for name, value in plan.cohort.items()),
        "optimiser steps": str(plan.steps),
        "learning rates": ", ".join(f"{rate:g}" for rate in plan.learning_rates),
    }


def page_tables(plan: Plan, records: Records) -> list[tuple[str, str, list[list[str]]]]:
    """(title, plot, rows with their header) of each regime, and the contrasts, for the page."""
    tables = []
    for regime in plan.regimes.values():
        rows = table_rows(plan, records, regime)
        if not rows:
            continue
        shown = [metric for metric in SECONDARY if any(metric in row.secondary for row in rows)]
        cells = [["arm", "what it is", "macro AUROC [95 %]", "seeds", *(SECONDARY[metric] for metric in shown)]]
        for row in rows:
            second = [f"{row.secondary[metric]:.3f}" if metric in row.secondary else "–" for metric in shown]
            cells.append([row.arm.name, row.arm.title, show(row.estimate), str(row.estimate.seeds), *second])
        tables.append((_title(regime), forest_plot(rows, f"Macro AUROC of each arm, {regime.name}"), cells))
    cells = [["contrast", "regime", "difference [95 %]", "p", "seeds"]]
    for found in differences(plan, records):
        name = f"{found.contrast.arm} − {found.contrast.against}" + (" (headline)" if found.contrast.headline else "")
        estimate = found.estimate
        cells.append([name, found.contrast.regime, show(estimate, True), f"{found.adjusted:.4f}", str(estimate.seeds)])
    return [*tables, ("Contrasts; p by Holm but for headlines", "", cells)]
