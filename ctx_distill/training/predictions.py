"""Gather predictions of all ranks in manifest order, and write prediction tables."""

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
    """Run `predict_step` over a loader and join the outputs of all ranks.

    Args:
        trainer: Runs the loop.
        task: Its `predict_step` returns a dict of tensors with one row per image, including `row`.
        loader: Loader of the images.
        rows: The manifest rows of the loader, in the requested order; repeated images count once.

    Returns:
        Each tensor (N, ...) in the order of `rows`, on the CPU; 16-bit floats are converted to float32 for NumPy.
    """
    outputs = trainer.predict(task, dataloaders=loader) or []
    # Not `task.device`: Lightning has moved the module to the CPU by now, and NCCL rejects CPU tensors.
    return join_rows(outputs, rows, trainer.strategy.root_device)


def join_rows(outputs: Sequence[Any], rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Join the outputs of all ranks for rows that were distributed over them (collective).

    Args:
        outputs: Outputs of this rank's batches, at least one: tensors with one row per image by name, including `row`.
        rows: The manifest rows in the requested order; repeated images count once.
        device: Device to gather on.

    Returns:
        Each tensor (N, ...) in the order of `rows`, on the CPU; 16-bit floats are converted to float32 for NumPy.
    """
    joined = {
        name: gather_with_gradient(torch.cat([output[name] for output in outputs]).to(device)).cpu()
        for name in outputs[0]
    }
    unique, first = np.unique(joined["row"].numpy(), return_index=True)
    order = torch.from_numpy(first[np.searchsorted(unique, np.asarray(rows))])
    halves = (torch.bfloat16, torch.float16)
    return {name: (x.float() if x.dtype in halves else x)[order] for name, x in joined.items()}


def study_means(manifest: Manifest, values: NDArray[np.floating]) -> tuple[pd.DataFrame, NDArray[np.float64]]:
    """Return the mean over the images of each study.

    Args:
        manifest: N rows.
        values: (N, F), aligned with the rows.

    Returns:
        The first row of each study (study_id, patient_id, ...) in manifest order, and the means (S, F).
    """
    codes = manifest.study_codes()
    unique, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    sums = np.zeros((len(unique), values.shape[1]))
    np.add.at(sums, inverse, values)
    means = sums / np.bincount(inverse)[:, None]
    order = np.argsort(first)
    return manifest.frame.iloc[first[order]], means[order]


def write_predictions(path: Path, studies: pd.DataFrame, probabilities: Mapping[str, NDArray[np.floating]]) -> None:
    """Write `study_id` and one probability per finding, atomically."""
    table = pd.DataFrame({"study_id": studies["study_id"].to_numpy(), **probabilities})
    write_text(path, table.to_csv(index=False, float_format="%.6f", lineterminator="\n"))
