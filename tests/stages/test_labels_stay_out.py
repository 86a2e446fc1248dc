"""Labels score; they never train stages 1 to 3, whatever they say."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ctx_distill.commands.main import main

pytestmark = pytest.mark.full


def with_shuffled_labels(cohort: Path, target: Path) -> Path:
    """The same cohort with the label columns of both manifests dealt out anew."""
    target.mkdir()
    shutil.copy(cohort / "cohort.json", target)  # of a phantom still: its vocabulary keeps every word
    for folder in ("ct", "xray"):
        shutil.copytree(cohort / folder, target / folder)
        table = pd.read_csv(cohort / f"{folder}.csv", dtype=str, keep_default_na=False)
        labels = [name for name in table.columns if name.startswith("label:")]
        order = np.random.default_rng(1).permutation(len(table))
        assert not table[labels].equals(table[labels].iloc[order].reset_index(drop=True))
        table[labels] = table[labels].to_numpy()[order]
        table.to_csv(target / f"{folder}.csv", index=False)
    return target


def test_shuffled_labels_train_identical_weights(
    finished_run: Path, cohort: Path, tiny_preset: Path, tmp_path: Path
) -> None:
    data = with_shuffled_labels(cohort, tmp_path / "data")
    run = tmp_path / "run"
    for stage in ("expert", "index", "distill", "align"):
        assert main([stage, "--data", str(data), "--run", str(run), "--preset", str(tiny_preset)]) == 0

    def weights(root: Path) -> dict[str, str]:
        return {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for stage in ("expert", "index", "distill", "align")
            for path in sorted((root / stage / "artefact").rglob("*.safetensors"))
        }

    assert len(weights(run)) == 5  # the prior's copy of the expert among them
    assert weights(run) == weights(finished_run)
    assert (run / "align" / "metrics.json").read_text() != (finished_run / "align" / "metrics.json").read_text()
