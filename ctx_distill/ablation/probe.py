"""Secondary measures of a trained arm: a linear probe on few labels, and report-to-volume recall."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctx_distill.checkpoint import load_weights, read_artefact
from ctx_distill.data.cache import shared_cache
from ctx_distill.data.datasets import ct_dataset
from ctx_distill.data.manifest import Manifest
from ctx_distill.data.transforms import VolumeSpec
from ctx_distill.metrics.classification import macro_auroc
from ctx_distill.metrics.retrieval import recall_at_k
from ctx_distill.models.ct_encoder import CTEncoder, build_ct_encoder
from ctx_distill.models.dual_encoder import TEXT_FOLDER, DualEncoder


def _volumes(manifest: Manifest, config: dict[str, Any], batch: int = 32) -> Any:
    """Batches (b, 1, D, H, W) of a manifest's volumes in order, out of the process's cache."""
    data = config["data"]["init_args"]
    spec = VolumeSpec.from_config(data["volume"])
    dataset = ct_dataset(manifest, spec, shared_cache(data.get("cache_gb", 1.0)), False)
    for start in range(0, len(dataset), batch):
        yield torch.stack([dataset[index].tensor for index in range(start, min(start + batch, len(dataset)))])


def _open_encoder(artefact: Path) -> CTEncoder:
    """The CT encoder of a dual encoder's or a fine-tuned classifier's artefact."""
    if (artefact / TEXT_FOLDER).is_dir():
        return DualEncoder.load(artefact)[0].ct_encoder
    found = read_artefact(artefact, "classifier")
    encoder = build_ct_encoder(found.config["encoder"])
    load_weights(encoder, found.weights(), "encoder.", str(artefact))
    return encoder.eval()


@torch.no_grad()
def embed(artefact: Path, manifest: Manifest, config: dict[str, Any]) -> Tensor:
    """Pooled CT features (N, D_c) of a manifest's rows in order.

    Args:
        artefact: of stage 3 or of a fine-tuned classifier.
        manifest: N rows.
        config: merged layers of a CT stage: volume spec and cache.
    """
    encoder = _open_encoder(artefact)
    return torch.cat([encoder(volume).pooled for volume in _volumes(manifest, config)])


def linear_probe(manifest: Manifest, pooled: Tensor, shares: Sequence[float], seed: int) -> dict[str, float]:
    """Macro AUROC on `test` of a logistic regression a finding, on shares of the labelled `train` rows.

    Args:
        manifest: N rows, `train` labelled.
        pooled: (N, D_c).
        shares: of the labelled rows.
        seed: of the draw of rows.

    Returns:
        `probe_auroc_<percent>`.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = manifest.labels()
    splits = manifest.frame["split"].to_numpy()
    train, test = np.flatnonzero(splits == "train"), np.flatnonzero(splits == "test")
    order = np.random.default_rng([seed, 43]).permutation(train)
    features = pooled.numpy()
    metrics = {}
    for share in shares:
        rows = order[: max(2, round(share * len(order)))]
        scores = np.zeros((len(test), labels.shape[1]))
        for column in range(labels.shape[1]):
            target = labels[rows, column] == 1
            if target.any() and not target.all():
                # C was fixed beforehand: strong shrinkage, since features outnumber the fewest rows
                model = make_pipeline(
                    StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=500)
                )
                scores[:, column] = model.fit(features[rows], target).decision_function(features[test])
        value = macro_auroc(labels[test], scores)
        metrics[f"probe_auroc_{round(100 * share)}"] = float("nan") if value is None else value
    return metrics


@torch.no_grad()
def report_recall(artefact: Path, scored: Manifest, pooled: Tensor) -> dict[str, float]:
    """Report-to-volume recall over the scored studies.

    Args:
        artefact: of stage 3.
        scored: N rows, one image a study.
        pooled: (N, D_c), what `embed` gave of them.

    Returns:
        `report_recall_at_5`, `_at_10`, `_at_50`.
    """
    model, _ = DualEncoder.load(artefact)
    image = torch.nn.functional.normalize(model.image_projection(pooled), dim=-1)
    reports = [scored.report(row) for row in scored.frame.index]
    text = torch.cat([model.encode_text(reports[start : start + 64]) for start in range(0, len(reports), 64)])
    similarity: NDArray[np.float32] = (text @ image.T).numpy()
    codes = scored.study_codes()
    found = recall_at_k(similarity, codes, codes, ks=(5, 10, 50))
    return {f"report_{name}": float(value) for name, value in found.items() if "at" in name and value is not None}
