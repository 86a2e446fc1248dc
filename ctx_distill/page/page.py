"""Assemble the run page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ctx_distill.files import write_text
from ctx_distill.page import plots
from ctx_distill.page.corrections import corrections
from ctx_distill.page.gather import STAGES, Metric, Run, gather, mapping, to_number
from ctx_distill.page.results import (
    all_metrics,
    has_labels,
    missing_parts,
    per_finding,
    report_baselines,
    result_rows,
    stage_states,
    tiles,
)
from ctx_distill.page.studies import label_table, studies
from ctx_distill.page.zero_shot import zero_shot_part

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parent / "templates"
SHOWN_CURVES = 4
CURVE_STAGES = ("expert", "distill", "align", "classifier", "report")


def build_page(run: Path) -> Path:
    """Write `RUN/index.html`: one self-contained file about a run, finished or not.

    Reads the run folder and the manifests that its run.json names, nothing else. What is missing is left out, and the
    page says so.

    Args:
        run: the run folder.

    Returns:
        The page's path.

    Raises:
        InputError: where the run folder does not exist.
    """
    run = Path(run)
    path = run / "index.html"
    write_text(path, render(gather(run)))
    return path


def environment() -> jinja2.Environment:
    """The templates and the filters that they use."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= {
        "number": number,
        "count_words": count_words,
        "metric": metric_words,
        "duration": duration,
        "percent": percent,
    }
    return made


def page_style() -> Markup:
    """The style sheet that every page carries."""
    return Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))


def render(run: Run) -> str:
    """The page's HTML."""
    models = [
        name for name, table in (("Zero-shot", run.zero_shot), ("Classifier", run.classifier)) if table is not None
    ]
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            style=page_style(),
            name=run.folder.resolve().name,
            run=run,
            stages=STAGES,
            has_labels=has_labels(run),
            tiles=tiles(run),
            rows=result_rows(run),
            beside=report_baselines(run),
            measured=all_metrics(run),
            missing=missing_parts(run),
            findings=_per_finding(run),
            asked=zero_shot_part(run),
            curves=_curves(run),
            rocs=_rocs(run),
            models=models,
            studies=studies(run),
            corrections=corrections(run),
            made=_how_made(run),
        )
    )


def number(value: object) -> str:
    """A number for a table: three decimals, whole numbers as they are, a dash for none."""
    found = to_number(value)
    if found is None:
        return "–"
    if found == int(found) and abs(found) > 1:
        return f"{int(found):,}"
    return f"{found:.3f}" if abs(found) < 1000 else f"{found:,.0f}"


def count_words(value: object) -> str:
    """A count with thousands set apart, a dash for none."""
    found = to_number(value)
    return "–" if found is None else f"{round(found):,}"


def metric_words(metric: Metric | None) -> str:
    """A metric with its interval: `0.812 [0.774, 0.846]`."""
    if metric is None or metric.value is None:
        return "–"
    interval = f" [{number(metric.low)}, {number(metric.high)}]" if metric.has_interval else ""
    return number(metric.value) + interval


def percent(value: float) -> str:
    """A share in [0, 1] as a CSS percentage."""
    return f"{100 * min(1.0, max(0.0, value)):.1f}%"


def duration(value: object) -> str:
    """Seconds as a person reads them."""
    seconds = to_number(value)
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _per_finding(run: Run) -> dict[str, Any] | None:
    """Plot and table of AUROC by finding: zero-shot, and the classifier beside it where it was scored."""
    series = {name: per_finding(run, key) for name, key in (("Zero-shot", "zero_shot"), ("Classifier", "classifier"))}
    series = {name: values for name, values in series.items() if values}
    if not series:
        return None
    first = next(iter(series.values()))
    names = sorted({name for values in series.values() for name in values})
    none = Metric(None)
    names.sort(key=lambda name: -(first.get(name, none).value or -1.0))
    counts = _counts(run)
    rows = [(name, [values.get(name) for values in series.values()]) for name in names]
    drawn = [(name, metrics) for name, metrics in rows if any(m and m.value is not None for m in metrics)]
    return {
        "series": list(series),
        "plot": Markup(plots.interval_plot(drawn, list(series), 0.5)) if drawn else None,
        "rows": [(name, counts.get(name), metrics) for name, metrics in rows],
    }


def _counts(run: Run) -> dict[str, tuple[int, int]]:
    """Test studies with and without each finding."""
    if run.ct is None or not run.ct.finding_names:
        return {}
    labels = label_table(run.ct.split("test"))
    return {str(name): (int((labels[name] == 1).sum()), int((labels[name] == 0).sum())) for name in labels.columns}


def _curves(run: Run) -> list[dict[str, Any]]:
    """Learning curves by stage: the first few terms, and the rest."""
    titles = {folder: name for folder, _, name in STAGES}
    found = []
    for folder in CURVE_STAGES:
        if folder not in run.logs:
            continue
        drawn = [
            (curve.term, plots.curve_words(curve), Markup(plots.curve_plot(curve)))
            for curve in plots.learning_curves(run.logs[folder])
        ]
        if drawn:
            found.append({"stage": titles[folder], "first": drawn[:SHOWN_CURVES], "rest": drawn[SHOWN_CURVES:]})
    return found


def _rocs(run: Run) -> dict[str, Any] | None:
    """ROC curves a finding of the test studies; the findings without both classes by name."""
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


def _how_made(run: Run) -> dict[str, Any]:
    """The facts of run.json, whichever of them are there, in words."""
    info = run.info
    expert, spec = mapping(info.get("expert")), mapping(info.get("volume_spec"))
    facts = [
        ("Run folder", str(run.folder)),
        ("Started", info.get("created")),
        ("Command", info.get("command")),
        ("Preset", info.get("preset")),
        ("ctx-distill", info.get("version")),
        ("X-ray expert", expert.get("name") or (info.get("expert") if isinstance(info.get("expert"), str) else None)),
        ("Expert's licence", expert.get("license") or expert.get("licence")),
        ("Expert's fingerprint", expert.get("fingerprint")),
        ("Volume", _spec_words(spec)),
    ]
    states = stage_states(run)
    recorded = mapping(info.get("stages"))
    return {
        "facts": [(name, str(value)) for name, value in facts if value],
        "data": [_data_row(name, info.get(key)) for name, key in (("CT", "ct"), ("X-ray", "xray")) if info.get(key)],
        "stages": [
            (
                name,
                states[folder],
                {"seconds": None, "fingerprint": None, **mapping(recorded.get(folder))},
            )
            for folder, _, name in STAGES
        ],
        "left_out": sorted(mapping(run.metrics.get("retrieval", {}).get("left_out")).items()),
    }


def _spec_words(spec: Mapping[str, Any]) -> str | None:
    """The volume spec in one line."""
    told = []
    for key, joint, unit in (("spacing", " × ", "mm"), ("shape", " × ", "voxels (z, y, x)"), ("window", " to ", "HU")):
        value = spec.get(key)
        if isinstance(value, list | tuple):
            told.append(f"{joint.join(f'{v:g}' if isinstance(v, int | float) else str(v) for v in value)} {unit}")
    return "; ".join(told) or None


def _data_row(name: str, value: object) -> dict[str, Any]:
    """One manifest as run.json tells it."""
    held = mapping(value) or {"path": value}
    splits = ", ".join(f"{split} {count}" for split, count in mapping(held.get("splits")).items())
    return {
        "name": name,
        "splits": splits,
        **{key: held.get(key) for key in ("path", "images", "studies", "patients", "fingerprint")},
    }
