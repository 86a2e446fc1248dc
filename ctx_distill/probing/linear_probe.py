"""`ctx-distill probe`: a linear probe on features that are computed once, and its curve over few examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ctx_distill.checkpoint import write_artefact
from ctx_distill.data.manifests.manifest import Manifest, read_manifest
from ctx_distill.errors import InputError
from ctx_distill.files import write_json, write_text
from ctx_distill.inference.model import CTModel
from ctx_distill.inference.parts import open_parts
from ctx_distill.inference.scans import with_progress
from ctx_distill.metrics.bootstrap import show
from ctx_distill.metrics.classification import classification_report
from ctx_distill.models.heads import FindingsHead
from ctx_distill.probing.few_shot import few_shot_curve, read_shots, write_curve
from ctx_distill.probing.logistic import Fit, Floats, fit_probes
from ctx_distill.run_files import ARTEFACT, METRICS_FILE, PREDICTIONS
from ctx_distill.training.pooled_features import features_key, read_features, write_features
from ctx_distill.training.predictions import study_means, write_predictions


def probe(
    checkpoint: Path, manifest_path: Path, out: Path, shots: Sequence[str] = (), seeds: int = 5, device: str = "cpu"
) -> str:
    """Fit and score a linear probe of the CT encoder's pooled features, and few-shot curves.

    Writes to OUT:

    - `features.safetensors`: pooled features (N, D_c) of the manifest's rows, for later runs; omitted if the classifier
      stage of the run has them
    - `metrics.json`: `classification_report` of `test`, `strength`, `val_macro_auroc`, `left_out`
    - `predictions.csv` and `unreadable.csv`
    - `artefact`, with a dual encoder: a classifier that `ctx_distill.load` opens in RUN/probe
    - `few_shot.csv` and `few_shot.svg`, with `shots`

    Args:
        checkpoint: run folder or artefact.
        manifest_path: manifest with label columns.
        out: folder to write to.
        shots: `5` for five positives and five negatives per finding, `10%` for that share of the training patients.
        seeds: number of draws of each.
        device: device on which features are computed.

    Returns:
        The summary to print.

    Raises:
        InputError: there are no labels, nothing to fit, or a split is empty.
    """
    manifest = read_manifest(manifest_path, check_images=False)
    if not manifest.finding_names:
        raise InputError(f"{manifest_path}: has no label:<finding> columns; a probe needs them.")
    if seeds < 1:
        raise InputError(f"probe: --seeds is {seeds}; expected 1 or more.")
    asked = [read_shots(text) for text in shots]
    model = CTModel(open_parts(checkpoint)).to(device)
    features, unreadable = _features(model, manifest, out)
    readable = manifest.where(~manifest.frame.index.isin(list(unreadable)))
    parts = {name: readable.split(name) for name in ("train", "val", "test")}
    empty = [name for name, part in parts.items() if not len(part)]
    if empty:
        raise InputError(f"{manifest_path}: no readable studies in `{empty[0]}`; a probe needs train, val and test.")
    data = {name: (features[part.frame.index], part.labels().astype(np.float64)) for name, part in parts.items()}
    fit = fit_probes(data["train"], data["val"])
    metrics = _score(fit, parts["test"], data["test"], out)
    metrics |= {"strength": fit.strength, "val_macro_auroc": fit.val_macro_auroc, "unreadable": len(unreadable)}
    lost = pd.DataFrame([[manifest.frame.at[r, "image_id"], why] for r, why in unreadable.items()], columns=["scan", "reason"])  # fmt: skip
    write_text(out / "unreadable.csv", lost.to_csv(index=False, lineterminator="\n"))
    _write_head(model, fit, manifest.finding_names, out)
    told = [f"linear probe, test macro AUROC {show(metrics['macro_auroc'])}, C = {fit.strength:g}, chosen on val"]
    if asked:
        table = few_shot_curve(data, parts["train"], parts["test"], asked, seeds)
        write_curve(table, out)
        told.append(table.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    write_json(out / METRICS_FILE, metrics)
    return "\n".join([*told, f"{len(unreadable)} scans unreadable", str(out)])


def _features(model: CTModel, manifest: Manifest, out: Path) -> tuple[Floats, dict[int, str]]:
    """Return features (N, D_c) by manifest row, NaN for unreadable scans, and the reasons.

    Features in OUT or of the run's classifier stage are reused.
    """
    key = features_key(model.encoder_fingerprint, manifest.fingerprint)
    for folder in (out, model.parts.source / "classifier"):
        standing = read_features(folder, key)
        if standing is not None:
            return standing, {}
    unreadable: dict[int, str] = {}
    rows: dict[int, Any] = {}
    for row in with_progress(list(manifest.frame.index)):
        try:
            rows[row] = model.pooled(manifest.scan_file(row).read())
        except InputError as error:
            unreadable[row] = str(error)
    if not rows:
        raise InputError(f"{manifest.path}: none of {len(manifest)} scans can be read; first: {next(iter(unreadable.values()))}")  # fmt: skip
    features = np.full((len(manifest), len(next(iter(rows.values())))), np.nan, dtype=np.float32)
    for row, value in rows.items():
        features[row] = value
    if not unreadable:  # a scan that is repaired later must be read
        write_features(out, key, features)
    return features.astype(np.float64), unreadable


def _score(fit: Fit, test: Manifest, data: tuple[Floats, Floats], out: Path) -> dict[str, Any]:
    kept = np.flatnonzero(fit.fitted).tolist()
    names = [test.finding_names[f] for f in kept]
    studies, means = study_means(test, fit.probabilities(data[0])[:, kept])
    write_predictions(out / PREDICTIONS, studies, {name: means[:, i] for i, name in enumerate(names)})
    labels = studies[[f"label:{name}" for name in names]].to_numpy()
    report = classification_report(labels, means, names, studies["patient_id"].tolist())
    return report | {"left_out": [name for name in test.finding_names if name not in names]}


def _write_head(model: CTModel, fit: Fit, names: Sequence[str], out: Path) -> None:
    """Write the probe as a classifier artefact; its weights include the standardisation."""
    parts = model.parts
    if parts.dual is None or parts.dual_artefact is None:
        return
    kept = np.flatnonzero(fit.fitted).tolist()
    head = FindingsHead(fit.weight.shape[1], len(kept), norm=False)
    with torch.no_grad():
        head.linear.weight.copy_(torch.from_numpy(fit.weight[kept]))
        head.linear.bias.copy_(torch.from_numpy(fit.bias[kept]))
    config = {
        "findings": [names[f] for f in kept],
        "mode": "linear",
        "norm": False,
        "volume_spec": parts.spec.to_config(),
        "encoder": parts.dual.ct_encoder.config(),
    }
    upstream = {"dual-encoder": parts.dual_artefact.fingerprint}
    write_artefact(out / ARTEFACT, "classifier", config, head.state_dict(prefix="head."), upstream)
