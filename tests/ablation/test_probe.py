"""The secondary measures read a model as the pipeline uses it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ctx_distill.ablation.secondary_measures import embed_aligned, report_recall
from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.data.transforms.model_volume import VolumeSpec
from ctx_distill.runs.stage_table import STAGES, stage_config
from ctx_distill.stages.zero_shot.task import ZeroShotTask

pytestmark = pytest.mark.full


def test_image_features_are_those_of_zero_shot_prior_and_all(
    finished_run: Path, cohort: Path, tiny_preset: Path
) -> None:
    config = stage_config(STAGES["align"], str(tiny_preset))
    artefact = finished_run / "align" / "artefact"
    test = read_manifest(cohort / "ct.csv").split("test")
    pooled, image = embed_aligned(artefact, test, config)

    task = ZeroShotTask(str(artefact)).eval()
    assert task.model.prior_weight > 0
    spec = VolumeSpec.from_config(config["data"]["init_args"]["volume"])
    module = CTDataModule(str(cohort / "ct.csv"), spec, batch_size=4, projection=True)
    with torch.no_grad():
        expected = torch.cat([task.predict_step(batch, 0)["image"] for batch in module.loader(test)])
        encoded = torch.cat([task.model.ct_encoder(batch.volume).pooled for batch in module.loader(test)])
        text = task.model.encode_text([test.report(row) for row in test.frame.index])
    torch.testing.assert_close(image, expected)
    torch.testing.assert_close(pooled, encoded)

    similarity = (text @ expected.T).numpy()
    codes = test.study_codes()
    hits = [codes[row] in codes[np.argsort(-similarity[row])[:5]] for row in range(len(codes))]
    assert report_recall(artefact, test, image)["report_recall_at_5"] == pytest.approx(np.mean(hits), abs=1e-6)
