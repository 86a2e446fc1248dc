"""Stage 4: findings asked of the dual encoder with prompts, with no label seen in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from ctx_distill.data.datamodules import CTDataModule
from ctx_distill.distributed import rank
from ctx_distill.metrics.classification import classification_report
from ctx_distill.models.dual_encoder import DualEncoder
from ctx_distill.tasks.base import StageTask, check_volume_spec
from ctx_distill.tasks.predict import predict_rows, study_means, write_predictions
from ctx_distill.tasks.prior import open_prior
from ctx_distill.tasks.prompting import pair_probabilities, prompt_features
from ctx_distill.text.findings import load_vocabulary
from ctx_distill.text.prompts import Templates
from ctx_distill.types import CTBatch


class ZeroShotTask(StageTask):
    """Zero-shot findings of the CT `test` studies.

    Args:
        model: folder of the stage-3 artefact.
        templates: `default`, `ensemble` or `normal`, see `prompt_pairs`.
        synonyms: ask with the vocabulary's synonyms of a finding too.
        vocabulary: findings to ask for where the manifest has no label columns.
    """

    def __init__(
        self, model: str, templates: Templates = "normal", synonyms: bool = True, vocabulary: str = "ct-rate"
    ) -> None:
        super().__init__()
        self.model, self.artefact = DualEncoder.load(Path(model))
        self.prior = open_prior(self.artefact, self.model.embed_dim)
        self.templates, self.synonyms, self.vocabulary = templates, synonyms, vocabulary

    def predict_step(self, batch: CTBatch, batch_idx: int) -> dict[str, Tensor]:
        """Image features (B, D), unit rows."""
        del batch_idx
        prior = None if self.prior is None else self.prior(batch)
        return {"image": self.model.encode_volume(batch.volume, prior)[0], "row": batch.row}

    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Ask, write `predictions.csv`, score where there are labels."""
        assert isinstance(datamodule, CTDataModule)
        check_volume_spec(self.artefact, datamodule)
        asked = Prompts(self.templates, self.synonyms, self.vocabulary)
        scale = float(self.model.logit_scale.detach().exp())
        return ask_test_studies(trainer, self, datamodule, folder, asked, self.model.encode_text, scale)


@dataclass(frozen=True)
class Prompts:
    """How findings are asked for; see `prompt_features`.

    Attributes:
        templates: which prompts.
        synonyms: of the findings too.
        vocabulary: findings to ask for where the manifest has no label columns.
    """

    templates: Templates
    synonyms: bool
    vocabulary: str


def ask_test_studies(
    trainer: L.Trainer,
    task: L.LightningModule,
    datamodule: CTDataModule,
    folder: Path,
    prompts: Prompts,
    encode_text: Callable[[list[str]], Tensor],
    logit_scale: float,
) -> dict[str, Any]:
    """Ask for findings in the CT `test` studies, write `predictions.csv`, score where there are labels.

    Args:
        trainer: runs the predict loop.
        task: its `predict_step` gives `image` (b, D), unit rows, and `row`.
        datamodule: of the CTs.
        folder: where the table goes.
        prompts: what is asked.
        encode_text: B texts to (B, D), in the space of `image`.
        logit_scale: 1 / temperature.

    Returns:
        `macro_auroc` and `per_finding` (see `classification_report`), and `studies`, their number.
    """
    test = datamodule.manifest.split("test")
    metrics: dict[str, Any] = {"macro_auroc": None, "per_finding": {}, "studies": 0}
    if not len(test):
        write_predictions(folder / "predictions.csv", test.frame, {})
        return metrics
    found = predict_rows(trainer, task, datamodule.loader(test), list(test.frame.index))
    names = list(test.finding_names)
    asked = names or load_vocabulary(prompts.vocabulary).names
    positive, negative = prompt_features(encode_text, asked, prompts.templates, prompts.synonyms)
    scores = pair_probabilities(found["image"], positive.cpu(), negative.cpu(), logit_scale)
    studies, means = study_means(test, scores.numpy())
    if rank() == 0:
        columns = {name: means[:, column] for column, name in enumerate(asked)}
        write_predictions(folder / "predictions.csv", studies, columns)
    metrics["studies"] = len(studies)
    if names:
        labels = studies[[f"label:{name}" for name in names]].to_numpy()
        metrics |= classification_report(labels, means, names, studies["patient_id"].tolist())
    return metrics
