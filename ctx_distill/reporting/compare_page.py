"""Compare several runs on one self-contained page, with differences paired by patient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from ctx_distill.errors import InputError
from ctx_distill.files import write_text
from ctx_distill.metrics.bootstrap import Interval
from ctx_distill.reporting import plots
from ctx_distill.reporting.paired import Source, difference, sources
from ctx_distill.reporting.pictures import CTPictures
from ctx_distill.reporting.results_section import missing_parts, per_finding
from ctx_distill.reporting.run_page import CURVE_STAGES, SHOWN_CURVES, environment, page_style
from ctx_distill.reporting.settings_section import data_warnings, setting_rows
from ctx_distill.reporting.studies_section import label_table, read_ct
from ctx_distill.runs.metric_catalogue import CATALOGUE
from ctx_distill.runs.run_reader import PAGE_STAGES, Metric, Run, gather, mapping

LARGEST = len(plots.SHAPES)
DISAGREEMENTS, SHOWN_FINDINGS = 4, 4


@dataclass(frozen=True)
class ShownDifference:
    """The difference between a run and the first one, in numbers and words.

    Attributes:
        numbers: The difference with its interval.
        words: Its interpretation.
        has_interval: Whether it has an interval that can contain 0.
    """

    numbers: str
    words: str
    has_interval: bool


@dataclass(frozen=True)
class ComparedRow:
    """A metric: one value per run, and one difference per run after the first."""

    stage: str
    name: str
    meaning: str
    values: tuple[Metric | None, ...]
    differences: tuple[ShownDifference, ...]


@dataclass(frozen=True)
class Disagreement:
    """A study on which the runs disagree: its findings with the label and one probability per run."""

    study_id: str
    apart: float
    findings: tuple[tuple[str, str, tuple[float, ...]], ...]
    report: str
    pictures: CTPictures | None
    problem: str


def build_compare_page(folders: Sequence[Path], out: Path) -> Path:
    """Write one page about two or more runs, finished or not.

    Args:
        folders: Run folders; the others are compared with the first.
        out: The HTML file.

    Returns:
        `out`.

    Raises:
        InputError: There are fewer than 2 or more than 6 runs, a run occurs twice, or a folder does not exist.
    """
    if not 2 <= len(folders) <= LARGEST:
        raise InputError(
            f"compare needs 2 to {LARGEST} run folders; got {len(folders)}. The others are compared with the first."
        )
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"compare got the same run twice: {', '.join(map(str, folders))}. Pass each run once.")
    runs = [gather(folder) for folder in folders]
    write_text(out, render_compare(runs, run_names(folders)))
    return out


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, with as many parents as needed to make them unique."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def render_compare(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return the HTML of the page."""
    held = [sources(run) for run in runs]
    rows = _rows(runs, held)
    findings = [part for part in (_findings(runs, names, held, *stage) for stage in _FINDING_STAGES) if part]
    every = [d for row in rows for d in row.differences if d.has_interval]
    every += [d for part in findings for _, _, differences in part["rows"] for d in differences if d.has_interval]
    return environment().get_template("compare.html.j2").render(
        style=page_style(),
        names=names,
        keys=[Markup(plots.legend_key(place)) for place in range(len(runs))],
        facts=_facts(runs),
        warnings=data_warnings(runs, names),
        settings=setting_rows(runs),
        missing=[(name, missing_parts(run)) for name, run in zip(names, runs, strict=True) if missing_parts(run)],
        rows=rows,
        tally=_tally(every),
        findings=findings,
        curves=_curves(runs, names),
        disagreements=_disagreements(runs),
    )  # fmt: skip


_FINDING_STAGES = (("zero_shot", "Zero-shot"), ("classifier", "Classifier"))


def _facts(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return facts of run.json, one row per fact."""

    def data(run: Run, key: str) -> str:
        manifest = mapping(run.info.get(key))
        splits = ", ".join(f"{split} {count}" for split, count in mapping(manifest.get("splits")).items())
        return f"{str(manifest.get('fingerprint') or 'unknown')[:12]}{f' ({splits})' if splits else ''}"

    facts = [(title, [str(run.info.get(key) or "–") for run in runs])
             for title, key in (("Started", "created"), ("Preset", "preset"), ("ctx-distill", "version"))]  # fmt: skip
    facts += [
        (f"{title} fingerprint", [data(run, key) for run in runs]) for title, key in (("CT", "ct"), ("X-ray", "xray"))
    ]
    return [("Folder", [str(run.folder) for run in runs]), *facts]


def _rows(runs: Sequence[Run], held: Sequence[list[Source]]) -> list[ComparedRow]:
    titles = {key: title for _, key, title in PAGE_STAGES}
    rows = []
    for key, listed in CATALOGUE.items():
        values = tuple(run.metric(key) for run in runs)
        if all(value is None or value.value is None for value in values):
            continue
        stage = titles[key.partition(".")[0]]
        rows.append(ComparedRow(stage, listed.name, listed.meaning, values, _differences(key, runs, held)))
    return rows


def _differences(key: str, runs: Sequence[Run], held: Sequence[list[Source]]) -> tuple[ShownDifference, ...]:
    differences = []
    for run, run_sources in zip(runs[1:], held[1:], strict=True):
        if (run.metric(key) or Metric(None)).value is None or (runs[0].metric(key) or Metric(None)).value is None:
            differences.append(ShownDifference("–", "not in both", False))
            continue
        interval = difference(key, run_sources, held[0], run, runs[0])
        differences.append(difference_words(interval, key in CATALOGUE and CATALOGUE[key].lower_is_better))
    return tuple(differences)


def difference_words(interval: Interval | str, lower_is_better: bool = False) -> ShownDifference:
    """Return a difference in numbers, and in words whether its interval excludes 0."""
    if isinstance(interval, str):
        return ShownDifference("–", interval, False)
    if interval.value is None or interval.low is None or interval.high is None:
        return ShownDifference("–", "not defined", False)
    if interval.value == interval.low == interval.high == 0:
        return ShownDifference("0", "the same", False)
    numbers = f"{_signed(interval.value)} [{_signed(interval.low)}, {_signed(interval.high)}]"
    if interval.low <= 0 <= interval.high:
        return ShownDifference(numbers, "no difference shown", True)
    better = (interval.value > 0) != lower_is_better
    return ShownDifference(numbers, "better" if better else "worse", True)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _tally(every: Sequence[ShownDifference]) -> str:
    """Return a sentence about multiple comparisons."""
    if not every:
        return "No metric that could be compared study by study differs."
    apart = sum(one.words in ("better", "worse") for one in every)
    luck = 0.05 * len(every)
    count = "1 paired difference" if len(every) == 1 else f"{len(every)} paired differences"
    return (
        f"Of {count} on this page, {apart} {'has' if apart == 1 else 'have'} an interval that excludes 0. Between equal runs, about {luck:.1f}"
        " would do so by chance. The intervals are not corrected for multiple comparisons, and each run is one training: another seed"
        " may change a metric by as much."
    )


def _findings(
    runs: Sequence[Run], names: Sequence[str], held: Sequence[list[Source]], stage: str, title: str
) -> dict[str, Any] | None:
    """Return plot and table of AUROC by finding."""
    values = [per_finding(run, stage) for run in runs]
    every = sorted({name for metrics in values for name in metrics})
    every.sort(key=lambda name: -max((metrics[name].value or 0.0) for metrics in values if name in metrics))
    rows = [
        (name, [metrics.get(name) for metrics in values], _differences(f"{stage}.per_finding.{name}", runs, held))
        for name in every
    ]
    drawn = [(name, metrics) for name, metrics, _ in rows if any(m and m.value is not None for m in metrics)]
    if not drawn:
        return None
    return {"title": title, "rows": rows, "plot": Markup(plots.interval_plot(drawn, names, 0.5))}


def _curves(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the curves of terms that at least two runs have, preferring validation curves."""
    titles = {folder: title for folder, _, title in PAGE_STAGES}
    found = []
    for folder in CURVE_STAGES:
        held = [
            {c.term: c for c in plots.learning_curves(run.logs[folder])} if folder in run.logs else {} for run in runs
        ]
        terms = list(dict.fromkeys(term for own in held for term in own))
        drawn = []
        for term in terms:
            own = [curves.get(term) for curves in held]
            if sum(curve is not None for curve in own) < 2:
                continue
            part = "val" if any(curve and curve.val for curve in own) else "train"
            series = [() if curve is None else curve.val if part == "val" else curve.train for curve in own]
            unit = next(curve.unit for curve in own if curve)
            ends = ", ".join(f"{n} {s[-1][1]:.3g}" for n, s in zip(names, series, strict=True) if s)
            drawn.append(
                (f"{part}/{term}", ends, Markup(plots.series_plot(f"{part}/{term}", unit, series, ends, every=True)))
            )
        drawn.sort(key=lambda one: one[0].startswith("train/"))
        if drawn:
            found.append({"stage": titles[folder], "first": drawn[:SHOWN_CURVES], "rest": drawn[SHOWN_CURVES:]})
    return found


def apart(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the disagreement of runs: the range of the ranks, in [0, 1], with one row per study and one column per finding.

    Within a run and finding, probabilities are converted to ranks over the studies, so that runs with the same order of
    studies agree, whatever the level of their probabilities.
    """
    studies = sorted(set.intersection(*(set(table.index) for table in tables)))
    names = [name for name in tables[0].columns if all(name in table.columns for table in tables)]
    ranks = np.stack([table.loc[studies, names].rank(pct=True).to_numpy(dtype=float) for table in tables])
    return pd.DataFrame(ranks.max(axis=0) - ranks.min(axis=0), index=studies, columns=names)


def _disagreements(runs: Sequence[Run]) -> list[Disagreement]:
    """Return the test studies whose zero-shot ranks differ most, mean over the findings; ties are broken by id."""
    tables = [run.zero_shot for run in runs if run.zero_shot is not None]
    ct = runs[0].ct
    if ct is None or len(tables) < len(runs):
        return []
    far = apart(tables)
    far = far[far.index.isin(set(ct.frame["study_id"].astype(str)))]
    if far.empty or not len(far.columns):
        return []
    labels = label_table(ct) if ct.finding_names else None
    order = far.mean(axis=1).sort_values(ascending=False, kind="stable").head(DISAGREEMENTS)
    found = []
    for study, mean in order.items():
        names = far.T[str(study)].sort_values(ascending=False, kind="stable").index[:SHOWN_FINDINGS]
        rows = tuple(
            (str(n), _truth(labels, str(study), str(n)), tuple(_cell(t, str(study), str(n)) for t in tables))
            for n in names
        )
        row = int(ct.frame.index[ct.frame["study_id"] == study][0])
        found.append(Disagreement(str(study), float(mean), rows, ct.report(row), *read_ct(ct, row)))
    return found


def _truth(labels: pd.DataFrame | None, study: str, name: str) -> str:
    if labels is None or name not in labels.columns or study not in labels.index:
        return "no label"
    return {1.0: "present", 0.0: "absent", -1.0: "uncertain"}.get(_cell(labels, study, name), "blank")


def _cell(table: pd.DataFrame, study: str, name: str) -> float:
    return float(table[name][study])
