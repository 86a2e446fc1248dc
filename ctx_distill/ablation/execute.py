"""One job of the ablation: its stages in this process, then its score.

Stages are run by the pipeline's own layers (`stages/*.yaml`, the preset, the arm's overrides), so that what is
measured is what a user runs. Only the schedule is set here: a number of optimiser steps that is the same for all arms.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from filelock import FileLock
from numpy.typing import NDArray

from ctx_distill.ablation.cohort_manifests import (
    Cohort,
    write_corpus,
    write_ct,
    write_held_out,
    write_probe,
    write_xray,
)
from ctx_distill.ablation.plan import CORE, AblationJob, Plan, job_layers, laid_over
from ctx_distill.data.manifests.manifest import Manifest
from ctx_distill.files import hash_json, write_json, write_text
from ctx_distill.metrics.bootstrap import resample_counts
from ctx_distill.metrics.classification import macro_auroc_replicates
from ctx_distill.run_files import ARTEFACT, CHECKPOINTS, LAYERS_FILE, METRICS_FILE, PREDICTIONS
from ctx_distill.runs.runner import fill
from ctx_distill.runs.stage_table import STAGES, stage_config

REPLICATES = 500
BOOTSTRAP_SEED = 2024
"""One seed for all runs: replicate r draws the same patients in every run, so that differences are paired."""


@dataclass(frozen=True)
class Place:
    """Where the ablation runs.

    Attributes:
        run: its folder.
        preset: name or path of the preset.
    """

    run: Path
    preset: str


@dataclass(frozen=True)
class JobScore:
    """What a job gives.

    Attributes:
        metrics: by name; the primary one is `macro_auroc`.
        replicates: (R,) macro AUROC under the resampled test patients, the same draws in every job.
        data: hash of the manifests.
    """

    metrics: dict[str, float]
    replicates: NDArray[np.float64]
    data: str


def run_job(place: Place, plan: Plan, cohort: Cohort, job: AblationJob) -> JobScore:
    """Run a job from its beginning; its folder keeps configurations, logs and predictions."""
    folder = place.run / job.folder
    shutil.rmtree(folder, ignore_errors=True)
    ct = write_ct(cohort, job.regime, job.seed, job.select)
    xray = write_xray(cohort, job.regime.pool)
    paths = {"{ct}": str(ct.path), "{xray}": str(xray.path)}
    paths["{expert}"] = str(ensure_expert(place, plan, cohort, job.regime.expert))
    paths["{index}"] = str(ensure_index(place, plan, ct, xray, job.regime.expert))
    paths["{student}"] = str(folder / STAGES["distill"].folder / ARTEFACT)
    paths["{model}"] = str(folder / STAGES["align"].folder / ARTEFACT)
    found: dict[str, Any] = {}
    for name in job.arm.stages:
        config = job_layers(plan, job, name, place.preset)
        found[name] = run_layers(folder / STAGES[name].folder, paths, config)
        shutil.rmtree(folder / STAGES[name].folder / CHECKPOINTS, ignore_errors=True)
    scored = ct.split("test")
    scorer = STAGES[list(job.arm.stages)[-1]].folder
    metrics, replicates = _primary(scored, folder / scorer / PREDICTIONS)
    metrics |= _watched(found)
    if not job.select:
        metrics |= _secondary(place, plan, cohort, job, scored)
    data = hash_json([ct.fingerprint, xray.fingerprint if job.arm.pool_matters else None])[:16]
    metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}  # a finding may lack a class
    write_json(folder / METRICS_FILE, metrics)
    return JobScore(metrics, replicates, data)


def run_layers(folder: Path, paths: dict[str, str], config: dict[str, Any]) -> dict[str, Any]:
    """Run one stage from merged layers; returns its metrics."""
    from ctx_distill.runs.lightning_cli import build, run_task

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LAYERS_FILE
    write_text(path, yaml.safe_dump(fill(config, {**paths, "{folder}": str(folder)}), sort_keys=False))
    cli = build(["--config", str(path)])
    metrics = run_task(cli, folder)
    write_json(folder / METRICS_FILE, metrics)
    return metrics


def ensure_expert(place: Place, plan: Plan, cohort: Cohort, name: str) -> Path:
    """The expert of this name, trained where it is not there yet."""
    spec = plan.experts[name]
    folder = place.run / "experts" / name
    (place.run / "experts").mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / METRICS_FILE).is_file():
            xray = write_xray(cohort, spec.xrays)
            steps = {"trainer": {"max_epochs": spec.epochs, "limit_val_batches": 0}}
            paths = {"{xray}": str(xray.path)}
            # The held-out CTs exclude their patients' X-rays. No report of the pairs reaches the expert: it would have read
            # more of them than an arm is given.
            corpus = str(write_corpus(cohort, spec.corpus)) if spec.corpus else None
            alone = {
                "data": {"init_args": {"ct_manifest": str(write_held_out(cohort).path)}},
                "model": {"init_args": {"read_ct_reports": False, "report_corpus": corpus}},
            }
            run_layers(folder, paths, laid_over(stage_config(STAGES["expert"], place.preset), steps, alone))
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return folder / ARTEFACT


def ensure_index(place: Place, plan: Plan, ct: Manifest, xray: Manifest, expert: str) -> Path:
    """The index of these X-rays and pairs, built where it is not there yet.

    It depends on the pairs too: the queries' centre is the mean of their reports.
    """
    del plan
    train = ct.split("train")
    key = hash_json([train.fingerprint, xray.fingerprint, expert])[:12]
    folder = place.run / "indexes" / key
    (place.run / "indexes").mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / METRICS_FILE).is_file():
            paths = {"{xray}": str(xray.path), "{ct}": str(ct.path)}
            paths["{expert}"] = str(place.run / "experts" / expert / ARTEFACT)
            run_layers(folder, paths, stage_config(STAGES["index"], place.preset))
    return folder / ARTEFACT


def _primary(scored: Manifest, predictions: Path) -> tuple[dict[str, float], NDArray[np.float64]]:
    """Macro AUROC, one a finding, and the macro under resampled patients."""
    table = pd.read_csv(predictions, dtype={"study_id": str}).set_index("study_id")
    names = list(scored.finding_names)
    scores = table.loc[scored.frame["study_id"], names].to_numpy()
    counts = resample_counts(scored.frame["patient_id"].tolist(), REPLICATES, BOOTSTRAP_SEED)
    values, macro = macro_auroc_replicates(scored.labels(), scores, counts)
    metrics = {"macro_auroc": float(np.nanmean(values))}
    metrics |= {f"auroc/{name}": float(value) for name, value in zip(names, values, strict=True)}
    return metrics, macro


_WATCHED = {
    "distill": ("train_target_entropy_share", "train_pair", "train_relation"),
    "align": ("train_false_negative_precision", "train_false_negative_recall", "train_corrected_share"),
}


def _watched(found: dict[str, Any]) -> dict[str, float]:
    """What the training logged of its targets and corrections, at its end."""
    return {
        f"{stage}/{name}": float(found[stage][name])
        for stage, names in _WATCHED.items()
        for name in names
        if isinstance(found.get(stage, {}).get(name), float)
    }


def _secondary(place: Place, plan: Plan, cohort: Cohort, job: AblationJob, scored: Manifest) -> dict[str, float]:
    """Report-to-volume recall, and in the core regime's own seeds a linear probe at several shares of labels."""
    from ctx_distill.ablation.secondary_measures import embed_aligned, embed_classifier, linear_probe, report_recall

    if not job.arm.trains:
        return {}
    probing = job.regime.name == CORE and job.seed in job.regime.seeds
    aligned = "align" in job.arm.stages
    artefact = place.run / job.folder / STAGES["align" if aligned else "classifier"].folder / ARTEFACT
    manifest = write_probe(cohort, plan.cohort["labelled"]) if probing else scored
    config = stage_config(STAGES["align"], place.preset)
    metrics = {}
    if aligned:
        pooled, image = embed_aligned(artefact, manifest, config)
        # one image a study, and the scored studies come last in either manifest
        metrics = report_recall(artefact, scored, image[-len(scored) :])
    else:
        pooled = embed_classifier(artefact, manifest, config)
    if probing:
        metrics |= linear_probe(manifest, pooled, plan.probe_shares, job.seed)
    return metrics
