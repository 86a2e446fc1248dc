"""Manifests of the ablation: which CT pairs a seed draws, which X-rays are in the pool, who is scored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ctx_distill.ablation.plan import Plan, Regime
from ctx_distill.data.manifests.manifest import Manifest, read_manifest
from ctx_distill.errors import InputError
from ctx_distill.files import write_text
from ctx_distill.phantom.cohort import DONE
from ctx_distill.phantom.items import plan_study
from ctx_distill.runs.runner import find_manifest

PREFIX = "ablation"


@dataclass(frozen=True)
class Cohort:
    """The cohort's CT studies in three parts, one image a study; no patient is in two.

    Attributes:
        folder: of the manifests.
        candidates: studies that a seed draws its pairs from.
        val: studies that choose learning rates and settings.
        test: studies that are scored.
        xray: all X-rays.
        labels: names of the findings.
        unused: studies that the plan has no use for.
    """

    folder: Path
    candidates: pd.DataFrame
    val: pd.DataFrame
    test: pd.DataFrame
    xray: pd.DataFrame
    labels: tuple[str, ...]
    unused: pd.DataFrame


def open_cohort(data: Path, plan: Plan) -> Cohort:
    """Read the cohort's manifests and part them.

    The first `candidates` studies of the split `train` are drawn from; the rest of `train` joins `val`.

    Raises:
        InputError: a manifest is missing or too small or has no labels, or the phantom cohort is of another generator
            version or seed than the plan's.
    """
    _check_generator(data, plan)
    ct, xray = (read_manifest(find_manifest(data, kind)) for kind in ("ct", "xray"))
    if not ct.finding_names:
        raise InputError(f"{ct.path}: has no label:<finding> columns; the ablation is scored against them.")
    frame = ct.frame[~ct.frame["study_id"].duplicated()]
    train, test = frame[frame["split"] == "train"], frame[frame["split"] == "test"]
    wanted = plan.cohort["candidates"]
    rest = pd.concat([frame[frame["split"] == "val"], train[wanted:]])
    val, unused = rest[: plan.cohort["val"]], rest[plan.cohort["val"] :]
    pools = max(regime.pool for regime in plan.regimes.values())
    for what, found, needed in (("CT `train` studies", len(train), wanted), ("X-rays", len(xray), pools)):
        if found < needed:
            raise InputError(f"{data}: {found} {what}, the ablation's plan needs {needed}; make a larger cohort.")
    if not len(test) or not len(val):
        raise InputError(f"{data}: {len(val)} studies to choose on and {len(test)} to score; expected some of both.")
    return Cohort(data, train[:wanted], val, test, xray.frame, ct.finding_names, unused)


def _check_generator(data: Path, plan: Plan) -> None:
    made = data / DONE
    if not made.is_file():
        return
    cohort = json.loads(made.read_text())
    for key in ("generator", "seed"):
        if key in plan.cohort and cohort[key] != plan.cohort[key]:
            raise InputError(
                f"{made}: made with {key} {cohort[key]}, the plan's cohort has {key} {plan.cohort[key]}; rows of two"
                f" cohorts make no table. Make the plan's cohort, or give a --plan whose cohort is this one."
            )


def draw_pairs(cohort: Cohort, regime: Regime, seed: int) -> pd.DataFrame:
    """The CT pairs of a seed; a smaller number of pairs is part of a larger one of the same seed.

    Args:
        cohort: the cohort.
        regime: number of pairs and share of normals.
        seed: of the draw.

    Raises:
        InputError: the cohort has too few normals (or others) for the share asked.
    """
    order = np.random.default_rng([seed, 41]).permutation(len(cohort.candidates))
    shuffled = cohort.candidates.iloc[order]
    if regime.normals is None:
        return shuffled[: regime.pairs]
    normal = ~(shuffled[[f"label:{name}" for name in cohort.labels]] == 1).any(axis=1)
    count = round(regime.pairs * regime.normals)
    parts = shuffled[normal][:count], shuffled[~normal][: regime.pairs - count]
    if len(parts[0]) + len(parts[1]) < regime.pairs:
        raise InputError(
            f"{cohort.folder}: too few studies for {regime.pairs} pairs with {regime.normals:.0%} normals."
        )
    return pd.concat(parts).sample(frac=1.0, random_state=seed)


def write_ct(cohort: Cohort, regime: Regime, seed: int, select: bool) -> Manifest:
    """The manifest of a job: its pairs as `train`, and those who are scored as `test`.

    With `select` the scored are the cohort's `val` patients, and no test patient is in the file.
    """
    scored = cohort.val if select else cohort.test
    frame = pd.concat([draw_pairs(cohort, regime, seed).assign(split="train"), scored.assign(split="test")])
    name = f"{PREFIX}.{'val' if select else 'test'}.{regime.pairs}.{regime.normals}.{seed}.csv"
    return _write(cohort.folder / name, frame)


def write_xray(cohort: Cohort, pool: int) -> Manifest:
    """The manifest of an index: the first `pool` X-rays, all `train`."""
    return _write(cohort.folder / f"{PREFIX}.xray.{pool}.csv", cohort.xray[:pool].assign(split="train"))


def write_held_out(cohort: Cohort) -> Manifest:
    """The CT manifest of everybody who is chosen on or scored, so that no X-ray of theirs trains an expert."""
    frame = pd.concat([cohort.val.assign(split="val"), cohort.test.assign(split="test")])
    return _write(cohort.folder / f"{PREFIX}.held_out.csv", frame)


def write_corpus(cohort: Cohort, size: int) -> Path:
    """CT reports without images for the expert's text tower, of nobody who is drawn from, chosen on or scored.

    Of the embedded cohort they are those of the next generator seed (their images are never made); of other data, those
    of the `train` studies that the ablation leaves out.
    """
    path = cohort.folder / f"{PREFIX}.corpus.{size}.csv"
    made = cohort.folder / DONE
    if not path.is_file():
        if made.is_file():
            seed = int(json.loads(made.read_text())["seed"]) + 1
            reports = [plan_study(seed, "ct", index).report for index in range(size)]
            table = pd.DataFrame(
                {"findings": [r.findings for r in reports], "impression": [r.impression for r in reports]}
            )
        else:
            table = cohort.unused[["findings", "impression"]][:size]
        write_text(path, table.to_csv(index=False, lineterminator="\n"))
    return path


def write_probe(cohort: Cohort, studies: int) -> Manifest:
    """The manifest of the linear probe: labelled candidates as `train`, the scored as `test`."""
    labelled = cohort.candidates[:studies].assign(split="train")
    frame = pd.concat([labelled, cohort.test.assign(split="test")])
    return _write(cohort.folder / f"{PREFIX}.probe.{studies}.csv", frame)


def _write(path: Path, frame: pd.DataFrame) -> Manifest:
    if not path.is_file():
        write_text(path, frame.drop(columns="study_code").to_csv(index=False, float_format="%g", lineterminator="\n"))
    return read_manifest(path)
