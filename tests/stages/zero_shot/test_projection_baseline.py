"""The baseline without any CT training: the expert asked about the CTs' own projections."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from ctx_distill.data.io.volume import read_volume
from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.data.transforms.projection import square_projection
from ctx_distill.errors import InputError
from ctx_distill.models.opening import open_expert
from ctx_distill.stages.zero_shot.projection_baseline import ProjectionZeroShotTask

pytestmark = pytest.mark.full
SPEC = VolumeSpec(spacing=(24.0, 24.0, 24.0), shape=(12, 16, 16))


def trainer_in(folder: Path) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder,
    )  # fmt: skip


def test_the_expert_s_answers_on_the_projections(finished_run: Path, cohort: Path, tmp_path: Path) -> None:
    source = str(finished_run / "expert/artefact")
    task = ProjectionZeroShotTask(source, templates="default", synonyms=False)
    module = CTDataModule(str(cohort / "ct.csv"), SPEC, projection=True)
    metrics = task.run(trainer_in(tmp_path), module, tmp_path)
    predictions = pd.read_csv(tmp_path / "predictions.csv", dtype={"study_id": str}).set_index("study_id")

    expert = open_expert(source)
    test = read_manifest(cohort / "ct.csv").split("test")
    by_study: dict[str, list[np.ndarray]] = {}
    name = test.finding_names[0]
    texts = [f"{name.capitalize()} is present.", f"{name.capitalize()} is not present."]
    prompts = expert.encode_text(texts)
    for row in test.frame.index:
        picture = square_projection(read_volume(test.image_file(row))).numpy()
        image = expert.encode_image(expert.preprocess(picture)[None])
        logits = torch.tensor(expert.logit_scale or 1.0) * image @ prompts.T
        by_study.setdefault(str(test.frame.at[row, "study_id"]), []).append(logits.softmax(dim=1)[0, 0].numpy())
    expected = pd.Series({study: float(np.mean(values)) for study, values in by_study.items()})
    np.testing.assert_allclose(predictions.loc[expected.index, name], expected, atol=2e-5)
    assert metrics["studies"] == len(predictions) == len(expected)

    truth = test.frame.drop_duplicates("study_id").set_index("study_id").loc[predictions.index]
    scores = [
        roc_auc_score(truth[f"label:{finding}"], predictions[finding])
        for finding in predictions.columns
        if truth[f"label:{finding}"].nunique() == 2
    ]
    value = metrics["macro_auroc"]["value"] if isinstance(metrics["macro_auroc"], dict) else metrics["macro_auroc"]
    assert value == pytest.approx(np.mean(scores), abs=2e-2)  # the table is rounded to six digits, which makes ties
    json.dumps(metrics)
    assert task.describe()["expert"]["fingerprint"] == expert.fingerprint()


def test_it_needs_projections_and_an_expert_that_reads(finished_run: Path, cohort: Path, tmp_path: Path) -> None:
    task = ProjectionZeroShotTask(str(finished_run / "expert/artefact"))
    with pytest.raises(InputError, match=r"data\.init_args\.projection=true"):
        task.run(trainer_in(tmp_path), CTDataModule(str(cohort / "ct.csv"), SPEC), tmp_path)
