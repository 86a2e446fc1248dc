"""Curves of a linear probe over few training labels: k examples per finding, or a share of the training patients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t as student_t

from ctx_distill.data.manifests.manifest import Manifest
from ctx_distill.errors import InputError
from ctx_distill.files import write_text
from ctx_distill.metrics.bootstrap import interval, resample_counts
from ctx_distill.metrics.classification import macro_auroc_replicates
from ctx_distill.probing.logistic import Fit, Floats, draw_shots, fit_probes
from ctx_distill.reporting.few_shot_section import COLUMNS, curve_plot
from ctx_distill.reporting.run_page import TEMPLATES
from ctx_distill.run_files import FEW_SHOT_CURVE
from ctx_distill.training.predictions import study_means

Data = tuple[Floats, Floats]
Rows = list[NDArray[np.intp]]


@dataclass(frozen=True, order=True)
class Shots:
    """The amount of training data.

    Attributes:
        share: whether `amount` is a percentage of the training patients; else k positives and k negatives per finding.
        amount: a number above 0.
    """

    share: bool
    amount: float

    def __str__(self) -> str:
        return f"{self.amount:g}%" if self.share else f"{self.amount:g}"


EVERYBODY = Shots(share=True, amount=100.0)


def read_shots(text: str) -> Shots:
    """Read `5` or `10%`.

    Raises:
        InputError: neither a whole number from 1 nor a percentage above 0 and up to 100.
    """
    found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", text.strip())
    shots = Shots(found[2] is not None, float(found[1] or found[2])) if found else None
    if shots is None or not 0 < shots.amount <= (100 if shots.share else np.inf):
        raise InputError(
            f"probe: --shots {text}, expected whole numbers from 1 (examples of each class per finding) or percentages of the"
            " training patients: 1 5 10 10% 50% 100%."
        )
    return shots


def draw_patients(patients: Sequence[str], percent: float, seed: int) -> NDArray[np.intp]:
    """Return the rows of a share of the patients, drawn without replacement; at least one patient.

    Args:
        patients: N ids.
        percent: above 0 and up to 100; the number of patients is rounded to the nearest.
        seed: draws of one seed are nested: those of a smaller share are among those of a larger.
    """
    ids = np.asarray(patients)
    known = np.unique(ids)
    order = np.random.default_rng(seed).permutation(len(known))
    drawn = known[order[: max(1, round(percent / 100 * len(known)))]]
    return np.flatnonzero(np.isin(ids, drawn))


def few_shot_curve(
    data: dict[str, Data], train: Manifest, test: Manifest, asked: Sequence[Shots], seeds: int
) -> pd.DataFrame:
    """Return one row per amount: the test macro AUROC, averaged over seeds.

    `low` and `high` are its 95 % interval over patients; the mean over seeds is taken within each bootstrap replicate.
    `seeds_low` and `seeds_high` are the 95 % interval of the mean over seeds (Student's t), for two seeds or more. `patients`
    is the mean number of training patients. A finding that cannot be fitted for some seed (fewer than k of a class, or one
    class only in a share) is excluded at that amount; `findings` counts the others. C is chosen on the complete `val`.

    Args:
        data: features (N, D) and labels (N, F) of `train`, `val` and `test`.
        train: the rows of `data["train"]`.
        test: the rows of `data["test"]`.
        asked: amounts.
        seeds: number of draws of each.
    """
    ids = np.asarray(train.frame["patient_id"].tolist(), dtype=np.str_)
    table = []
    for shots in sorted(set(asked)):
        draws = 1 if shots == EVERYBODY else seeds  # all of which would be the same
        drawn = [_draw(shots, data["train"][1], ids, seed) for seed in range(draws)]
        row: dict[str, object] = {"shots": str(shots), "findings": 0}
        scored = _scored(data, test, drawn)
        if scored is not None:
            values, replicates, findings = scored
            found = interval(float(np.mean(values)), np.mean(replicates, axis=0)).as_json() or {}
            row |= {"macro_auroc": found["value"], "low": found["low"], "high": found["high"]}
            row |= {"lowest_seed": min(values), "highest_seed": max(values), "seeds": draws, "findings": findings}
            row["patients"] = float(np.mean([len(np.unique(ids[np.concatenate(rows)])) for rows in drawn]))
            if draws > 1:
                half = float(student_t.ppf(0.975, draws - 1)) * float(np.std(values, ddof=1)) / draws**0.5
                row |= {"seeds_low": found["value"] - half, "seeds_high": found["value"] + half}
        table.append(row)
    return pd.DataFrame(table, columns=list(COLUMNS))


def _draw(shots: Shots, labels: Floats, patients: NDArray[np.str_], seed: int) -> Rows:
    if not shots.share:
        return draw_shots(labels, int(shots.amount), seed)
    own = draw_patients(patients.tolist(), shots.amount, seed)
    return [own[np.isin(column[own], (0, 1))] for column in labels.T]


def _scored(data: dict[str, Data], test: Manifest, drawn: list[Rows]) -> tuple[list[float], list[Floats], int] | None:
    """Return macro AUROC and replicates per seed, and the number of findings; None if there are none."""
    fits: list[Fit] = []
    for rows in drawn:
        try:
            fits.append(fit_probes(data["train"], data["val"], rows=rows))
        except InputError:  # no finding of both classes
            return None
    kept = np.flatnonzero(np.all([fit.fitted for fit in fits], axis=0)).tolist()
    if not kept:
        return None
    values, replicates, findings = [], [], 0
    for fit in fits:
        studies, means = study_means(test, fit.probabilities(data["test"][0])[:, kept])
        labels = studies[[f"label:{test.finding_names[f]}" for f in kept]].to_numpy()
        each, macro = macro_auroc_replicates(labels, means, resample_counts(studies["patient_id"].tolist()))
        findings = int((~np.isnan(each)).sum())
        if not findings:
            return None
        values.append(float(np.nanmean(each)))
        replicates.append(macro)
    return values, replicates, findings


def write_curve(table: pd.DataFrame, out: Path) -> None:
    """Write `few_shot.csv` and `few_shot.svg` into a folder."""
    write_text(out / FEW_SHOT_CURVE, table.to_csv(index=False, lineterminator="\n"))
    write_text(out / "few_shot.svg", curve_picture(table))


def curve_picture(table: pd.DataFrame) -> str:
    """Return a stand-alone SVG of `few_shot_section.curve_plot`."""
    style = f"<style><![CDATA[{(TEMPLATES / 'style.css').read_text(encoding='utf-8')}]]></style>"
    return curve_plot(table, style).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"
