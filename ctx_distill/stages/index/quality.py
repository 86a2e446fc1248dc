"""Measure the index's retrieval quality on held-out CT reports, compared with random, TF-IDF and an oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ctx_distill.data.manifests.manifest import Manifest
from ctx_distill.files import write_text
from ctx_distill.metrics.retrieval import common_labels, retrieval_quality
from ctx_distill.metrics.tfidf import tfidf_nearest
from ctx_distill.retrieval.lookup import NeighbourLookup
from ctx_distill.retrieval.store import XrayIndexArtefact
from ctx_distill.run_files import RETRIEVAL
from ctx_distill.stages.shared.report_findings import FindingsReader
from ctx_distill.text.extractor import Vocabulary

VISIBLE = "_visible"
"""Suffix of metrics that are restricted to findings visible on an X-ray."""


def held_out_studies(ct: Manifest) -> Manifest:
    """Return one row per `val` and `test` study that has a report."""
    held_out = ct.split("val", "test")
    held_out = held_out.where(~held_out.frame["study_id"].duplicated().to_numpy())
    return held_out.where(np.array([bool(held_out.report(row)) for row in held_out.frame.index], dtype=bool))


def measure_retrieval(
    store: XrayIndexArtefact,
    queries: Tensor,
    held_out: Manifest,
    pool: Manifest,
    neighbours: int,
    vocabulary: Vocabulary,
    reader: FindingsReader | None,
) -> dict[str, Any]:
    """Look up held-out reports, write `retrieval.csv`, and compare findings if both manifests have labels.

    Labels are used for scoring only: the lookup, its re-rank and TF-IDF read texts only.

    Args:
        store: The index; `retrieval.csv` is written beside its folder.
        queries: (N, D_t) unit rows of the reports of `held_out`.
        held_out: N studies.
        pool: The X-rays of the index, in its order.
        neighbours: X-rays per study in `retrieval.csv`.
        vocabulary: Defines which findings are visible on an X-ray.
        reader: Extracts findings for the re-rank, which is then measured too; None disables it.

    Returns:
        The result of `retrieval_quality`, with `tfidf` and, with a reader, `rerank`. If the vocabulary contains all
        compared findings and some, but not all, are visible on an X-ray, the metrics over the visible findings are
        added under names that end in `_visible`.
    """
    k = min(neighbours, len(pool))
    similarity, positions = store.search(queries, k)
    write_neighbours(store.folder.parent / RETRIEVAL, held_out, pool, similarity.numpy(), positions.numpy())
    names, query_labels, pool_labels = common_labels(
        held_out.finding_names, held_out.labels(), pool.finding_names, pool.labels()
    )
    metrics: dict[str, Any] = {"queries": len(held_out), "findings_compared": names}
    if not names:
        return metrics
    reports = [held_out.report(row) for row in held_out.frame.index]
    others: dict[str, ArrayLike] = {}
    pool_reports = [pool.report(row) for row in pool.frame.index]
    if any(pool_reports):
        others["tfidf"] = tfidf_nearest(reports, pool_reports, k)
    if reader is not None:
        lookup = NeighbourLookup(store, k, findings_rerank=True, visible=reader.visible)
        others["rerank"] = lookup.look_up(queries, reader.extract(reports))["positions"].numpy()
    patients = held_out.frame["patient_id"].tolist()
    metrics |= retrieval_quality(query_labels, pool_labels, positions.numpy(), patients, others=others)
    visible = visible_columns(names, vocabulary)
    if visible is not None:
        shown = retrieval_quality(
            query_labels[:, visible], pool_labels[:, visible], positions.numpy(), patients, others=others
        )
        metrics["findings_visible"] = [name for name, keep in zip(names, visible, strict=True) if keep]
        metrics |= {f"{name}{VISIBLE}": value for name, value in shown.items() if name not in ("queries", "pool")}
    return metrics


def visible_columns(names: list[str], vocabulary: Vocabulary) -> NDArray[np.bool_] | None:
    """Return which findings are visible on an X-ray, (F,) bool.

    Returns None if the vocabulary lacks a finding, or if all or none of the findings are visible.
    """
    shown = {name.lower(): keep for name, keep in zip(vocabulary.names, vocabulary.visible_on_xray, strict=True)}
    if any(name.lower() not in shown for name in names):
        return None
    visible = np.array([shown[name.lower()] for name in names], dtype=bool)
    return visible if visible.any() and not visible.all() else None


def write_neighbours(
    path: Path, queries: Manifest, pool: Manifest, similarity: NDArray[np.float32], positions: NDArray[np.int64]
) -> None:
    """Write the nearest X-rays of each CT study to `retrieval.csv` (docs/contracts.md)."""
    count, k = positions.shape
    nearest = pool.frame.iloc[positions.reshape(-1)]
    table = pd.DataFrame(
        {
            "study_id": np.repeat(queries.frame["study_id"].to_numpy(), k),
            "split": np.repeat(queries.frame["split"].to_numpy(), k),
            "rank": np.tile(np.arange(1, k + 1), count),
            "xray_study_id": nearest["study_id"].to_numpy(),
            "xray_image_id": nearest["image_id"].to_numpy(),
            "similarity": similarity.reshape(-1),
        }
    )
    write_text(path, table.to_csv(index=False, float_format="%.5f", lineterminator="\n"))
