"""`ctx-distill evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ctx_distill.commands.parameters import Overrides


def evaluate(
    checkpoint: Path,
    manifest: Path,
    /,
    *overrides: Overrides,
    out: Path | None = None,
    protocol: Literal["ct-rate-18", "fvlm-16"] | None = None,
    vocabulary: str | None = None,
    templates: str = "normal",
    split: Literal["train", "val", "test"] = "test",
    synonyms: Annotated[bool, Parameter(negative="--no-synonyms")] = True,
) -> None:
    """Evaluate a finished model zero-shot on any manifest of CTs: findings, retrieval, published rows.

    Any other option is a LightningCLI override, such as `--trainer.accelerator=gpu`.

    Args:
        checkpoint: Run folder, or folder of a stage-3 artefact.
        manifest: CSV or Parquet manifest of CTs.
        overrides: LightningCLI overrides.
        out: Folder of the results. Default: `<manifest>.zero_shot` beside the manifest.
        protocol: Findings of a published protocol. Default: the label columns of the manifest.
        vocabulary: Findings and synonyms to query: a shipped vocabulary or a YAML file.
        templates: Prompts: `default`, `ensemble`, `normal`, or a YAML file of prompt pairs.
        split: Studies to score.
        synonyms: Query with the synonyms of each finding too.
    """
    print(f"loading the model of {checkpoint} ...", flush=True)
    from ctx_distill.runs.zero_shot_evaluation import Query, evaluate_zero_shot

    query = Query(checkpoint, manifest, out, protocol, vocabulary, templates, split, synonyms)
    print(evaluate_zero_shot(query, list(overrides)))
