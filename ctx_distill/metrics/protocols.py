"""The evaluation protocols of CT-RATE by name, and the published results that a run is compared with.

The results are copied from the papers and were not reproduced; `docs/zero_shot.md` lists the pitfalls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ctx_distill.errors import InputError

CT_RATE_18 = (
    "Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion",
    "Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis", "Lung nodule",
    "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion", "Mosaic attenuation pattern",
    "Peribronchial thickening", "Consolidation", "Bronchiectasis", "Interlobular septal thickening",
)  # fmt: skip
FVLM_LEFT_OUT = ("Medical material", "Lymphadenopathy")
PROTOCOLS: dict[str, tuple[str, ...]] = {
    "ct-rate-18": CT_RATE_18,
    "fvlm-16": tuple(name for name in CT_RATE_18 if name not in FVLM_LEFT_OUT),
}
VALIDATION = (1564, 1304)
"""Studies and patients of CT-RATE's validation set."""


def protocol_findings(name: str) -> tuple[str, ...]:
    """Return the findings of a protocol.

    Raises:
        InputError: the protocol is unknown.
    """
    if name not in PROTOCOLS:
        raise InputError(f"unknown protocol {name!r}; choose from: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


@dataclass(frozen=True)
class Published:
    """A published result; None where the paper has no such figure.

    Attributes:
        model: name of the model.
        source: arXiv number of its paper; None if it was not identified.
        auroc: macro.
        weighted_f1: see docs/zero_shot.md.
        accuracy: mean over findings.
    """

    model: str
    source: str | None
    auroc: float | None = None
    weighted_f1: float | None = None
    accuracy: float | None = None


CT_RATE_ROWS = (
    Published("CT-CLIP", "2403.17834", 0.731, 0.707, 0.668),
    Published("BIUD, as retrained by others", "2404.04936", 0.713, 0.716, 0.681),
    Published("Merlin, retrained", "2406.06512", 0.728, 0.709, 0.672),
    Published("fVLM", "2501.14548", 0.778, 0.751, 0.718),
    Published("ViSD-Boost", "2508.03742", 0.790, 0.759, 0.731),
    Published("COLIPRI", "2510.15042", 0.798),
    Published("EXACT", "2604.24146", 0.830, 0.836, 0.768),
    Published("RadFinder", "2603.02026", 0.838),
    Published("OKA-CT", None, 0.849),
    Published("Spectrum/BDA", None, 0.856),
)
RETRIEVAL_ROWS: tuple[tuple[str, str, dict[int, float]], ...] = (
    ("CT-CLIP", "2403.17834", {5: 0.029, 10: 0.050, 50: 0.180, 100: 0.287}),
    ("SPECTRE", "2511.17209", {5: 0.175, 10: 0.255, 50: 0.489, 100: 0.599}),
)


def cited(model: str, source: str | None) -> str:
    """Return the model with its paper: `fVLM (arXiv 2501.14548)`."""
    return f"{model} ({f'arXiv {source}' if source else 'paper not identified'})"


def comparability(metrics: dict[str, Any]) -> str:
    """Return a sentence on whether a run can be compared with the published results."""
    if metrics.get("synthetic"):
        return "NOT COMPARABLE: this run is scored on synthetic phantoms, the published rows on CT-RATE's patients."
    if metrics.get("protocol") not in PROTOCOLS or metrics.get("not_scored"):
        return "NOT COMPARABLE: this run does not score all labels of a CT-RATE protocol (--protocol ct-rate-18 or fvlm-16)."
    if (metrics.get("studies"), metrics.get("patients")) != VALIDATION:
        return (
            f"NOT COMPARABLE unless the data are the same: {metrics.get('studies')} studies of {metrics.get('patients')} patients "
            "here, 1,564 of 1,304 in CT-RATE's validation set."
        )
    return (
        "As many studies and patients as CT-RATE's validation set. Published F1 and accuracy use thresholds chosen on the "
        "evaluation set, and some rows count reconstructions instead of studies or 16 labels instead of 18."
    )
