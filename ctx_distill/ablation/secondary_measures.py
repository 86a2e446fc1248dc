"""Secondary measures of a trained arm: a linear probe on few labels, and report-to-volume recall."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctx_distill.checkpoint import load_weights, read_artefact
from ctx_distill.data.loading.cache import shared_cache
from ctx_distill.data.loading.datasets import Collate, ct_dataset
from ctx_distill.data.manifests.manifest import Manifest
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.metrics.classification import macro_auroc
from ctx_distill.metrics.retrieval import recall_at_k
from ctx_distill.models.ct_encoder import build_ct_encoder
from ctx_distill.models.dual_encoder import DualEncoder
from ctx_distill.probing.logistic import Scale, fit_probe
from ctx_distill.stages.shared.projection_prior import open_prior
from ctx_distill.types import CTBatch


def _batches(manifest: Manifest, config: dict[str, Any], projection: bool, size: int = 32) -> Iterator[CTBatch]:
    """Yield a manifest's volumes in order, with their projections if requested, from the process's cache."""
    data = config["data"]["init_args"]
    spec = VolumeSpec.from_config(data["volume"])
    dataset = ct_dataset(manifest, spec, shared_cache(data.get("cache_gb", 1.0)), False, projection)
    collate = Collate(CTBatch)
    for start in range(0, len(dataset), size):
        batch = collate([dataset[index] for index in range(start, min(start + size, len(dataset)))])
        assert isinstance(batch, CTBatch)
        yield batch


@torch.no_grad()
def embed_classifier(artefact: Path, manifest: Manifest, config: dict[str, Any]) -> Tensor:
    """Return pooled CT features (N, D_c) of a manifest's rows in order, from a fine-tuned classifier's encoder.

    Args:
        artefact: artefact of the classifier.
        manifest: N rows.
        config: merged layers of a CT stage: volume spec and cache.
    """
    found = read_artefact(artefact, "classifier")
    encoder = build_ct_encoder(found.config["encoder"])
    load_weights(encoder, found.weights(), "encoder.", str(artefact))
    encoder.eval()
    return torch.cat([encoder(batch.volume).pooled for batch in _batches(manifest, config, False)])


@torch.no_grad()
def embed_aligned(artefact: Path, manifest: Manifest, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return pooled CT features (N, D_c) and image features (N, D), with the projection prior, of a manifest's rows in order.

    Args:
        artefact: artefact of stage 3.
        manifest: N rows.
        config: merged layers of a CT stage: volume spec and cache.
    """
    model, read = DualEncoder.load(artefact)
    prior = open_prior(read, model.embed_dim)
    pooled, image = [], []
    for batch in _batches(manifest, config, prior is not None):
        features, output = model.encode_volume(batch.volume, None if prior is None else prior.features(batch))
        pooled.append(output.pooled)
        image.append(features)
    return torch.cat(pooled), torch.cat(image)


def linear_probe(manifest: Manifest, pooled: Tensor, shares: Sequence[float], seed: int) -> dict[str, float]:
    """Return the macro AUROC on `test` of a logistic regression per finding, for shares of the labelled `train` rows.

    Args:
        manifest: N rows, `train` labelled.
        pooled: features (N, D_c).
        shares: shares of the labelled rows.
        seed: seed of the draw of rows.

    Returns:
        `probe_auroc_<percent>`.
    """
    labels = manifest.labels()
    splits = manifest.frame["split"].to_numpy()
    train, test = np.flatnonzero(splits == "train"), np.flatnonzero(splits == "test")
    order = np.random.default_rng([seed, 43]).permutation(train)
    features = pooled.numpy()
    metrics = {}
    for share in shares:
        rows = order[: max(2, round(share * len(order)))]
        scores, scale = np.zeros((len(test), labels.shape[1])), Scale.of(features[rows])
        for column in range(labels.shape[1]):
            target = labels[rows, column] == 1
            if target.any() and not target.all():
                # C was fixed beforehand: strong shrinkage, since features outnumber the fewest rows
                weight, bias = fit_probe(features[rows], target, scale, C=0.01, class_weight="balanced", max_iter=500)
                scores[:, column] = features[test] @ weight + bias
        value = macro_auroc(labels[test], scores)
        metrics[f"probe_auroc_{round(100 * share)}"] = float("nan") if value is None else value
    return metrics


@torch.no_grad()
def report_recall(artefact: Path, scored: Manifest, image: Tensor) -> dict[str, float]:
    """Return the report-to-volume recall over the scored studies.

    Args:
        artefact: artefact of stage 3.
        scored: N rows, one image per study.
        image: image features (N, D) of `embed_aligned`.

    Returns:
        `report_recall_at_5`, `_at_10`, `_at_50`.
    """
    model, _ = DualEncoder.load(artefact)
    reports = [scored.report(row) for row in scored.frame.index]
    text = torch.cat([model.encode_text(reports[start : start + 64]) for start in range(0, len(reports), 64)])
    codes = scored.study_codes()
    found = recall_at_k(text.numpy(), image.numpy(), codes, codes, ks=(5, 10, 50))
    return {f"report_{name}": float(value) for name, value in found.items() if "at" in name and value is not None}
