"""How good the index's retrieval is for the held-out CT reports, beside random, TF-IDF and an oracle."""

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
"""Ends the names of what is measured over the findings that an X-ray shows."""


def held_out_studies(ct: Manifest) -> Manifest:
    """One row of each `val` and `test` study that has a report."""
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
    """Look up held-out reports, write `retrieval.csv` and compare findings where both manifests have labels.

    Labels score here and nothing else: the lookup, its re-rank and TF-IDF read texts alone.

    Args:
        store: the index; `retrieval.csv` goes beside its folder.
        queries: (N, D_t) unit rows of the reports of `held_out`.
        held_out: N studies.
        pool: the X-rays of the index, in its order.
        neighbours: X-rays a study in `retrieval.csv`.
        vocabulary: says which findings an X-ray shows.
        reader: of the findings re-rank, which is measured too (`_rerank`); None leaves it out.

    Returns:
        What `retrieval_quality` returns, with `tfidf` and, where there is a reader, `rerank` beside it; where the
        vocabulary knows all compared findings and an X-ray shows some and not all, the same over those that it shows
        under names that end in `_visible`.
    """
    k = min(neighbours, len(pool))
    similarity, positions = store.search(queries, k)
    write_neighbours(store.folder.parent / RETRIEVAL, held_out, pool, similarity.numpy(), positions.numpy())
    names, asked, known = common_labels(held_out.finding_names, held_out.labels(), pool.finding_names, pool.labels())
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
    metrics |= retrieval_quality(asked, known, positions.numpy(), patients, others=others)
    visible = visible_columns(names, vocabulary)
    if visible is not None:
        shown = retrieval_quality(asked[:, visible], known[:, visible], positions.numpy(), patients, others=others)
        metrics["findings_visible"] = [name for name, keep in zip(names, visible, strict=True) if keep]
        metrics |= {f"{name}{VISIBLE}": value for name, value in shown.items() if name not in ("queries", "pool")}
    return metrics


def visible_columns(names: list[str], vocabulary: Vocabulary) -> NDArray[np.bool_] | None:
    """(F,): which of the findings an X-ray shows; None where the vocabulary lacks one, or there is nothing to tell."""
    shown = {name.lower(): keep for name, keep in zip(vocabulary.names, vocabulary.visible_on_xray, strict=True)}
    if any(name.lower() not in shown for name in names):
        return None
    visible = np.array([shown[name.lower()] for name in names], dtype=bool)
    return visible if visible.any() and not visible.all() else None


def write_neighbours(
    path: Path, queries: Manifest, pool: Manifest, similarity: NDArray[np.float32], positions: NDArray[np.int64]
) -> None:
    """Write the nearest X-rays of each CT study (contract: `retrieval.csv`)."""
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
