"""Assemble the run page."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ctx_distill.files import write_text
from ctx_distill.reporting import plots
from ctx_distill.reporting.corrections_section import corrections
from ctx_distill.reporting.errors_section import model_errors
from ctx_distill.reporting.failures_section import failures
from ctx_distill.reporting.few_shot_section import few_shot_part
from ctx_distill.reporting.label_text_section import contradicted
from ctx_distill.reporting.overlays import RAMP
from ctx_distill.reporting.provenance_section import how_made
from ctx_distill.reporting.results_section import (
    all_metrics,
    has_labels,
    missing_parts,
    per_finding,
    report_baselines,
    result_rows,
    tiles,
)
from ctx_distill.reporting.stages_section import SECTIONS, STUDY_PARTS_OF, of_stage, stage_facts
from ctx_distill.reporting.studies_section import label_table, studies
from ctx_distill.reporting.wanted_maps import study_maps
from ctx_distill.reporting.zero_shot_section import zero_shot_part
from ctx_distill.run_files import PAGE
from ctx_distill.runs.run_reader import PAGE_STAGES, Metric, Run, gather, to_number

if TYPE_CHECKING:
    import jinja2

    from ctx_distill.data.manifests.manifest import Manifest

TEMPLATES = Path(__file__).parent / "templates"
SHOWN_CURVES = 4
FINDING_SERIES = {"Zero-shot": "zero_shot", "Classifier": "classifier"}
STUDY_PARTS = ("xray", "findings", "report")
CURVE_STAGES = ("expert", "distill", "align", "classifier", "report")


def build_page(run: Path) -> Path:
    """Write `RUN/index.html`, a self-contained page about a complete or incomplete run, and `RUN/<stage>/index.html`.

    Only the run folder and the manifests in its run.json are read. The page lists missing parts.

    Args:
        run: The run folder.

    Returns:
        The run page's path.

    Raises:
        InputError: The run folder does not exist.
    """
    run = Path(run)
    path = run / PAGE
    gathered = gather(run)
    values = contents(gathered)
    for folder, _, _ in PAGE_STAGES:
        if (run / folder).is_dir():
            write_text(run / folder / PAGE, render(values | stage_contents(gathered, folder, values)))
    write_text(path, render(values))
    return path


@functools.cache
def environment() -> jinja2.Environment:
    """Return the templates with their filters."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.filters |= {
        "number": number,
        "count_words": count_words,
        "metric": metric_words,
        "duration": duration,
        "percent": percent,
    }
    return templates


def page_style() -> Markup:
    """Return the style sheet of all pages."""
    return Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))


def render(values: dict[str, Any]) -> str:
    """Return the HTML of `contents`."""
    return environment().get_template("page.html.j2").render(values)


def contents(run: Run) -> dict[str, Any]:
    """Return the variables of the run page's template."""
    models = [
        name for name, table in (("Zero-shot", run.zero_shot), ("Classifier", run.classifier)) if table is not None
    ]
    chosen = studies(run)
    return dict(  # noqa: C408  # the template's variables, one per line
        style=page_style(),
        name=run.folder.resolve().name,
        run=run,
        stages=PAGE_STAGES,
        has_labels=has_labels(run),
        tiles=tiles(run),
        rows=result_rows(run),
        beside=report_baselines(run),
        measured=all_metrics(run),
        missing=missing_parts(run),
        findings=_per_finding(run, FINDING_SERIES),
        asked=zero_shot_part(run),
        curves=_curves(run),
        rocs=_rocs(run),
        models=models,
        studies=chosen,
        study_parts=STUDY_PARTS,
        salient=study_maps(run, [study.study_id for study in chosen]),
        failed=failures(run) + contradicted(run),
        errors=model_errors(run),
        ramp=RAMP,
        stage=None,
        linked={name: f"{folder}/index.html" for folder, _, name in PAGE_STAGES if (run.folder / folder).is_dir()},
        corrections=corrections(run),
        few=few_shot_part(run),
        made=how_made(run),
    )


def stage_contents(run: Run, folder: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the variables of one stage's page, from those of the run page."""
    kept, stage_run = SECTIONS.get(folder, ()), of_stage(run, folder)
    name = next(name for place, _, name in PAGE_STAGES if place == folder)
    series = {"X-ray expert": "expert"} if folder == "expert" else FINDING_SERIES
    always = ("style", "name", "stages", "has_labels", "made", "ramp", "models")
    shown = {key: value if key in (*always, *kept) else None for key, value in values.items()}
    up = {each: f"../{place}" for each, place in values["linked"].items()}
    return shown | {
        "run": stage_run,
        "rows": result_rows(stage_run),
        "measured": all_metrics(stage_run),
        "findings": _per_finding(stage_run, series),
        "curves": _curves(stage_run),
        "rocs": _rocs(stage_run),
        "missing": list(run.notes),
        "failed": [one for one in values["failed"] if one.stage == folder],
        "errors": [one for one in values["errors"] if one.key == folder],
        "salient": {},  # the run page's maps are of later stages' models
        "study_parts": STUDY_PARTS_OF.get(folder, ()),
        "linked": up,
        "stage": stage_facts(run, folder, name),
    }


def number(value: object) -> str:
    """Format a number for a table: three decimals, one from 10 on, integers unchanged, a dash for None."""
    found = to_number(value)
    if found is None:
        return "–"
    if found == int(found) and abs(found) > 1:
        return f"{int(found):,}"
    return f"{found:.3f}" if abs(found) < 10 else f"{found:.1f}" if abs(found) < 1000 else f"{found:,.0f}"


def count_words(value: object) -> str:
    """Format a count with a thousands separator, or a dash for None."""
    found = to_number(value)
    return "–" if found is None else f"{round(found):,}"


def metric_words(metric: Metric | None) -> str:
    """Format a metric with its interval: `0.812 [0.774, 0.846]`."""
    if metric is None or metric.value is None:
        return "–"
    interval = f" [{number(metric.low)}, {number(metric.high)}]" if metric.has_interval else ""
    return number(metric.value) + interval


def percent(value: float) -> str:
    """Format a share in [0, 1] as a CSS percentage."""
    return f"{100 * min(1.0, max(0.0, value)):.1f}%"


def duration(value: object) -> str:
    """Format seconds as hours, minutes and seconds."""
    seconds = to_number(value)
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _per_finding(run: Run, wanted: Mapping[str, str]) -> dict[str, Any] | None:
    """Return plot and table of AUROC by finding, for the `wanted` stages (metrics key by name) that were scored."""
    series = {name: per_finding(run, key) for name, key in wanted.items()}
    series = {name: values for name, values in series.items() if values}
    if not series:
        return None
    first = next(iter(series.values()))
    names = sorted({name for values in series.values() for name in values})
    none = Metric(None)
    names.sort(key=lambda name: -(first.get(name, none).value or -1.0))
    counts = _counts(run.xray if "expert" in wanted.values() else run.ct)
    rows = [(name, [values.get(name) for values in series.values()]) for name in names]
    drawn = [(name, metrics) for name, metrics in rows if any(m and m.value is not None for m in metrics)]
    return {
        "series": list(series),
        "plot": Markup(plots.interval_plot(drawn, list(series), 0.5)) if drawn else None,
        "rows": [(name, counts.get(name), metrics) for name, metrics in rows],
    }


def _counts(manifest: Manifest | None) -> dict[str, tuple[int, int]]:
    """Return the numbers of test studies with and without each finding."""
    if manifest is None or not manifest.finding_names:
        return {}
    labels = label_table(manifest.split("test"))
    return {str(name): (int((labels[name] == 1).sum()), int((labels[name] == 0).sum())) for name in labels.columns}


def _curves(run: Run) -> list[dict[str, Any]]:
    """Return the learning curves by stage: the first terms, the rest, and constant terms in words."""
    titles = {folder: name for folder, _, name in PAGE_STAGES}
    found = []
    for folder in CURVE_STAGES:
        if folder not in run.logs:
            continue
        curves = plots.learning_curves(run.logs[folder])
        flat = [f"{curve.term} ({plots.curve_words(curve)})" for curve in curves if curve.is_flat]
        drawn = [
            (curve.term, plots.curve_words(curve), Markup(plots.curve_plot(curve)))
            for curve in curves
            if not curve.is_flat
        ]
        if curves:
            parts = {"first": drawn[:SHOWN_CURVES], "rest": drawn[SHOWN_CURVES:], "flat": flat}
            found.append({"stage": titles[folder], **parts})
    return found


def _rocs(run: Run) -> dict[str, Any] | None:
    """Return the ROC curves per finding of the test studies, and the names of findings without both classes."""
    tables = {"Zero-shot": run.zero_shot, "Classifier": run.classifier}
    held = {name: table for name, table in tables.items() if table is not None}
    if run.ct is None or not run.ct.finding_names or not held:
        return None
    labels = label_table(run.ct.split("test"))
    drawn, left_out = [], []
    for finding in labels.columns:
        curves = []
        for table in held.values():
            both = table.index.intersection(labels.index) if finding in table.columns else table.index[:0]
            truth = labels.loc[both, finding].to_numpy(dtype=float)
            curves.append(plots.roc(truth, table.loc[both, finding].to_numpy(dtype=float)) if len(both) else None)
        known = [curve for curve in curves if curve is not None]
        if not known:
            left_out.append(str(finding))
            continue
        areas = [(name, f"{curve.auroc:.2f}") for name, curve in zip(held, curves, strict=True) if curve is not None]
        picture = Markup(plots.roc_plot(str(finding), curves, list(held)))
        drawn.append((str(finding), areas, known[0].positives, known[0].negatives, picture))
    return {"series": list(held), "drawn": drawn, "left_out": left_out}
