"""The curve over few labels on a run's page, in `RUN/probe/`, from features of the classifier stage."""

from __future__ import annotations

from pathlib import Path

from ctx_distill.errors import InputError
from ctx_distill.files import hash_json, write_json
from ctx_distill.reporting.few_shot_section import FOLDER
from ctx_distill.run_files import ARTEFACT, FEW_SHOT_CURVE
from ctx_distill.runs.run_folder import read_json
from ctx_distill.runs.run_reader import gather

SHOTS = ("1", "5", "20", "10%", "50%", "100%")
SEEDS = 5
MOST_STUDIES = 5000
"""With more training studies the fits take longer than a stage; `ctx-distill probe` makes the curve then."""
RECORD = "few_labels.json"


def write_few_labels(run: Path) -> bool:
    """Fit the probes and write their curve, if the run has features of labelled studies and no curve for them yet.

    Returns:
        Whether the curve was written.
    """
    from ctx_distill.checkpoint import read_artefact
    from ctx_distill.training.pooled_features import FEATURES, features_key, read_features

    if not (run / "classifier" / FEATURES).is_file():
        return False
    ct = gather(run).ct
    if ct is None or not ct.finding_names or not 0 < len(ct.split("train")) <= MOST_STUDIES:
        return False
    try:
        key = features_key(read_artefact(run / "align" / ARTEFACT, "dual-encoder").fingerprint, ct.fingerprint)
        asked = hash_json([key, SHOTS, SEEDS])
        out = run / FOLDER
        if (read_json(out / RECORD) or {}).get("asked") == asked and (out / FEW_SHOT_CURVE).is_file():
            return False
        if read_features(run / "classifier", key) is None:
            return False
        from ctx_distill.probing.linear_probe import probe

        probe(run, ct.path, out, SHOTS, SEEDS)
    except InputError as error:  # a page without the curve is better than none
        print(f"few labels: no curve: {error}")
        return False
    write_json(out / RECORD, {"asked": asked})
    return True
