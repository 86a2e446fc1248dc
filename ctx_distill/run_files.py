"""The names of the files in a run folder and in the folder of a stage."""

from __future__ import annotations

ARTEFACT = "artefact"
"""Folder of what a stage hands to the next ones."""
ARTEFACT_FILE = "artefact.json"
"""The record in an artefact's folder."""
CHECKPOINTS = "checkpoints"
LOG = "logs/metrics.csv"

RUN_FILE = "run.json"
REQUEST_FILE = "request.json"
METRICS_FILE = "metrics.json"
TRAINING_FILE = "training.json"
CONFIG_FILE = "config.yaml"
LAYERS_FILE = "layers.yaml"
PAGE = "index.html"

PREDICTIONS = "predictions.csv"
ZERO_SHOT_PREDICTIONS = "zero_shot_predictions.csv"
"""The zero-shot predictions, copied to the top of the run folder."""
REPORTS = "reports.csv"
RETRIEVAL = "retrieval.csv"
CORRECTED = "corrected.csv"
FEW_SHOT_CURVE = "few_shot.csv"
