"""Predictions of all ranks in manifest order, and the tables that stages write from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctx_distill.data.manifests.manifest import Manifest
from ctx_distill.distributed import gather_with_gradient
from ctx_distill.files import write_text


def predict_rows(trainer: L.Trainer, task: L.LightningModule, loader: Any, rows: Sequence[int]) -> dict[str, Tensor]:
    """Run `predict_step` over a loader and join what all ranks found.

    Args:
        trainer: runs the loop.
        task: its `predict_step` gives a dict of tensors with one row an image, `row` among them.
        loader: of the images.
        rows: the manifest rows that it covers, in the order wanted; an image seen twice by a sampler counts once.

    Returns:
        Each tensor (N, ...) in that order, on the CPU; what was computed in 16 bits as float32, which NumPy knows.
    """
    outputs = trainer.predict(task, dataloaders=loader) or []
    # Not `task.device`: by now Lightning has moved the module to the CPU, whose tensors NCCL refuses.
    return join_rows(outputs, rows, trainer.strategy.root_device)


def join_rows(outputs: Sequence[Any], rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Join what all ranks computed of rows that a held-out loader parted among them; collective.

    Args:
        outputs: of this rank's batches, at least one: tensors with one row an image by name, `row` among them.
        rows: the manifest rows in the order wanted; an image seen twice by a sampler counts once.
        device: that ranks gather on.

    Returns:
        Each tensor (N, ...) in that order, on the CPU; what was computed in 16 bits as float32, which NumPy knows.
    """
    joined = {
        name: gather_with_gradient(torch.cat([output[name] for output in outputs]).to(device)).cpu()
        for name in outputs[0]
    }
    found, first = np.unique(joined["row"].numpy(), return_index=True)
    order = torch.from_numpy(first[np.searchsorted(found, np.asarray(rows))])
    halves = (torch.bfloat16, torch.float16)
    return {name: (x.float() if x.dtype in halves else x)[order] for name, x in joined.items()}


def study_means(manifest: Manifest, values: NDArray[np.floating]) -> tuple[pd.DataFrame, NDArray[np.float64]]:
    """Mean over the images of each study.

    Args:
        manifest: N rows.
        values: (N, F), aligned with the rows.

    Returns:
        The first row of each study (study_id, patient_id, ...) in manifest order, and (S, F) means.
    """
    codes = manifest.study_codes()
    unique, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    sums = np.zeros((len(unique), values.shape[1]))
    np.add.at(sums, inverse, values)
    means = sums / np.bincount(inverse)[:, None]
    order = np.argsort(first)
    return manifest.frame.iloc[first[order]], means[order]


def write_predictions(path: Path, studies: pd.DataFrame, probabilities: Mapping[str, NDArray[np.floating]]) -> None:
    """Write `study_id` and a probability a finding, whole or not at all."""
    table = pd.DataFrame({"study_id": studies["study_id"].to_numpy(), **probabilities})
    write_text(path, table.to_csv(index=False, float_format="%.6f", lineterminator="\n"))
