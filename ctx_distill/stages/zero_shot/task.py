"""Stage 4: zero-shot findings of the dual encoder with prompts, and retrieval between reports and volumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import pandas as pd
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ctx_distill.data.loading.datamodules import CTDataModule
from ctx_distill.data.manifests.manifest import Manifest
from ctx_distill.distributed import rank
from ctx_distill.files import write_text
from ctx_distill.metrics.classification import macro_auroc
from ctx_distill.metrics.findings_report import findings_report
from ctx_distill.metrics.operating import THRESHOLD_RULE, Threshold, choose_thresholds
from ctx_distill.metrics.protocols import PROTOCOLS, protocol_findings
from ctx_distill.metrics.report_retrieval import DIRECTIONS, report_retrieval
from ctx_distill.metrics.zero_shot_table import zero_shot_markdown
from ctx_distill.models.dual_encoder import DualEncoder
from ctx_distill.run_files import PREDICTIONS, RETRIEVAL
from ctx_distill.stages.shared.projection_prior import open_prior
from ctx_distill.stages.shared.prompt_scores import pair_probabilities, prompt_features, same_finding
from ctx_distill.text.extractor import load_vocabulary
from ctx_distill.text.prompts import load_templates
from ctx_distill.training.base_task import StageTask, check_volume_spec
from ctx_distill.training.predictions import predict_rows, study_means, write_predictions
from ctx_distill.types import CTBatch

RETRIEVAL_RULE = (
    "one row per study (mean image features of its reconstructions, and its report); studies with the same report text "
    "count as correct for each other; strict_*: only the study itself is correct, and ties count against it"
)


@dataclass(frozen=True)
class Prompts:
    """Which findings are predicted, and with which prompts; see `prompt_features`.

    Attributes:
        templates: `default`, `ensemble`, `normal`, or a YAML file; see `load_templates`.
        synonyms: Also use synonyms of the findings.
        vocabulary: Findings to predict if the manifest has no label columns, or with protocol `vocabulary`.
        protocol: Which findings: `labels` (the manifest's columns), `vocabulary`, or a protocol of `metrics/protocols.py`,
            with synonyms from the vocabulary.
        split: Split to score; thresholds always come from `val`.
    """

    templates: str
    synonyms: bool
    vocabulary: str
    protocol: str = "labels"
    split: str = "test"

    def findings(self, manifest: Manifest) -> list[str]:
        """Return the findings to predict."""
        if self.protocol in PROTOCOLS:
            return list(protocol_findings(self.protocol))
        labelled = list(manifest.finding_names) if self.protocol == "labels" else []
        return labelled or load_vocabulary(self.vocabulary).names


class ZeroShotTask(StageTask):
    """Predict zero-shot findings of the CT `test` studies, and retrieve between their volumes and reports.

    Args:
        model: Folder of the stage-3 artefact.
        templates: See `Prompts`.
        synonyms: Also use the vocabulary's synonyms of a finding.
        vocabulary: Findings to predict if the manifest has no label columns.
        protocol: See `Prompts`.
        split: See `Prompts`.
    """

    def __init__(
        self,
        model: str,
        templates: str = "normal",
        synonyms: bool = True,
        vocabulary: str = "ct-rate",
        protocol: Literal["labels", "vocabulary", "ct-rate-18", "fvlm-16"] = "labels",
        split: Literal["train", "val", "test"] = "test",
    ) -> None:
        super().__init__()
        self.prompts = Prompts(templates, synonyms, vocabulary, protocol, split)
        load_templates(templates)
        self.model, self.artefact = DualEncoder.load(Path(model))
        self.prior = open_prior(self.artefact, self.model.embed_dim)

    def predict_step(self, batch: CTBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return image and report features, both (B, D), unit rows."""
        del batch_idx
        prior = None if self.prior is None else self.prior.features(batch)
        image = self.model.encode_volume(batch.volume, prior)[0]
        return {"image": image, "text": self.model.encode_text(batch.report), "row": batch.row}

    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Predict findings, write `predictions.csv`, `retrieval.csv` and `table.md`, and score them if there are labels."""
        assert isinstance(datamodule, CTDataModule)
        check_volume_spec(self.artefact, datamodule)
        scale = float(self.model.logit_scale.detach().exp())
        metrics = evaluate_studies(trainer, self, datamodule, folder, self.prompts, self.model.encode_text, scale)
        if rank() == 0 and metrics["studies"]:
            write_text(folder / "table.md", zero_shot_markdown(metrics))
        return metrics | {"model_fingerprint": self.artefact.fingerprint}


def evaluate_studies(
    trainer: L.Trainer,
    task: L.LightningModule,
    datamodule: CTDataModule,
    folder: Path,
    prompts: Prompts,
    encode_text: Callable[[list[str]], Tensor],
    logit_scale: float,
) -> dict[str, Any]:
    """Predict findings of the CT studies of a split, write `predictions.csv`, and score them if there are labels.

    Args:
        trainer: Runs the predict loop.
        task: Its `predict_step` returns `image` (b, D), unit rows, and `row`. If it also returns `text` (b, D) of the
            reports, retrieval is evaluated and `retrieval.csv` is written.
        datamodule: Provides the CTs.
        folder: Folder of the tables.
        prompts: Which findings and prompts.
        encode_text: Maps B texts to (B, D), in the space of `image`.
        logit_scale: 1 / temperature.

    Returns:
        The results of `findings_report` (`macro_auroc`, `per_finding`, ...), the number of `studies`, `retrieval` of
        `report_retrieval`, `protocol`, `split`, `threshold_rule`, and `not_scored` (findings without a label column).
    """
    scored = datamodule.manifest.split(prompts.split)
    findings = prompts.findings(scored)
    columns = _label_columns(findings, scored)
    metrics: dict[str, Any] = {"macro_auroc": None, "per_finding": {}, "studies": 0}
    metrics |= {
        "protocol": prompts.protocol, "split": prompts.split, "templates": prompts.templates,
        "threshold_rule": THRESHOLD_RULE, "asked": findings, "synthetic": scored.synthetic,
        "not_scored": [name for name in findings if name not in columns],
    }  # fmt: skip
    if not len(scored):
        write_predictions(folder / PREDICTIONS, scored.frame, {})
        return metrics
    features = predict_rows(trainer, task, datamodule.loader(scored), list(scored.frame.index))
    vocabulary = load_vocabulary(prompts.vocabulary) if prompts.protocol != "labels" else None
    directions = prompt_features(encode_text, findings, load_templates(prompts.templates), prompts.synonyms, vocabulary)
    positive, negative = (side.cpu() for side in directions)
    scores = pair_probabilities(features["image"], positive, negative, logit_scale).numpy()
    studies, means = study_means(scored, scores)
    if rank() == 0:
        write_predictions(folder / PREDICTIONS, studies, {name: means[:, f] for f, name in enumerate(findings)})
    metrics |= {
        "studies": len(studies), "images": len(scored), "patients": int(studies["patient_id"].nunique()),
    }  # fmt: skip
    if columns:
        place = [findings.index(name) for name in columns]
        thresholds = [Threshold(None, "val is scored, and thresholds chosen on it would be optimistic")] * len(place)
        if prompts.split != "val":
            val = datamodule.manifest.split("val")
            val_scores = np.zeros((0, len(findings)))
            if len(val):
                val_features = predict_rows(trainer, task, datamodule.loader(val), list(val.frame.index))
                val_scores = pair_probabilities(val_features["image"], positive, negative, logit_scale).numpy()
            rows, val_means = study_means(val, val_scores)
            thresholds = choose_thresholds(_labels(rows, columns), val_means[:, place])
        labels = _labels(studies, columns)
        metrics |= findings_report(
            labels, means[:, place], list(columns), studies["patient_id"].tolist(), thresholds
        )  # fmt: skip
        if len(scored) > len(studies):
            by_image = macro_auroc(_labels(scored.frame, columns), scores[:, place])
            metrics["macro_auroc_by_reconstruction"] = by_image
    if "text" in features:
        metrics["retrieval"] = _retrieve(features, scored, folder)
    return metrics


def _label_columns(findings: list[str], manifest: Manifest) -> dict[str, str]:
    """Return the label column of each finding that has one, ignoring case and underscores."""
    known = {same_finding(name): f"label:{name}" for name in manifest.finding_names}
    return {name: known[same_finding(name)] for name in findings if same_finding(name) in known}


def _labels(rows: pd.DataFrame, columns: dict[str, str]) -> NDArray[np.float64]:
    labels: NDArray[np.float64] = rows[list(columns.values())].to_numpy(dtype=np.float64)
    return labels


def _retrieve(features: dict[str, Tensor], manifest: Manifest, folder: Path) -> dict[str, Any] | None:
    """Evaluate retrieval among the studies that have a report, and write `retrieval.csv`."""
    studies, image = study_means(manifest, F.normalize(features["image"].double(), dim=-1).numpy())
    reports = [manifest.report(int(row)) for row in studies.index]
    silent = np.array([not report for report in reports], dtype=bool)
    place = {int(row): i for i, row in enumerate(manifest.frame.index)}
    text = features["text"].double()[[place[int(row)] for row in studies.index]].numpy()
    image = image / np.maximum(np.linalg.norm(image, axis=1, keepdims=True), 1e-12)
    kept = studies[~silent]
    texts = [report for report in reports if report]
    if not texts:
        return None
    metrics, ranks = report_retrieval(image[~silent], text[~silent], texts, kept["patient_id"].tolist())
    if rank() == 0:
        ids = kept["study_id"].to_numpy()
        tables = [
            pd.DataFrame({
                "direction": direction, "study_id": ids, "rank": ranks[direction]["rank"].astype(int),
                "strict_rank": ranks[direction]["strict_rank"].astype(int),
                "nearest_study_id": ids[ranks[direction]["nearest"].astype(int)],
            })
            for direction in DIRECTIONS
        ]  # fmt: skip
        write_text(folder / RETRIEVAL, pd.concat(tables).to_csv(index=False, lineterminator="\n"))
    return metrics | {"without_report": int(silent.sum()), "rule": RETRIEVAL_RULE}
