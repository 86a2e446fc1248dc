"""False negatives of contrastive learning: evidence, identification, correction (the RoCo part of BIUD, 2404.04936).

Two studies with the same findings have interchangeable reports, yet InfoNCE pushes them apart. Evidence that a pair
(image i, report j) is such a false negative comes from frozen models and texts, never from labels. A pair whose evidence
passes a threshold is suspected. Suspected pairs become soft positives, or are excluded from the denominator. The paper's
thresholds are not public: evidence and corrections are **ours**.

All matrices are (B, B) over the global batch, with image i in rows and report j in columns. No function has a gradient.
Results depend on the studies of the global batch, but not on their order or on the rank that loaded them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ctx_distill.losses.contrastive import study_targets, working_precision
from ctx_distill.losses.pair_order import pair_order
from ctx_distill.types import InputError

EvidenceKind = Literal["report", "findings", "retrieved", "ema"]
CorrectionMode = Literal["relabel", "mask", "soft"]

TOLERANCE = 1e-6
"""Tolerance below a threshold. The cosine of two identical reports is 1 up to rounding, and the threshold, a quantile of
cosines that were summed in another order, may be one bit above 1."""


def _cosine(rows: Tensor, columns: Tensor) -> Tensor:
    """Return cosines computed in float64, also under autocast; with narrower types, the last bits depend on the batch."""
    dtype = working_precision(rows).dtype
    with torch.autocast(rows.device.type, enabled=False):
        rows, columns = F.normalize(rows.detach().double(), dim=-1), F.normalize(columns.detach().double(), dim=-1)
        return (rows @ columns.T).to(dtype)


def report_evidence(report_embeddings: Tensor) -> Tensor:
    """Return the cosines of frozen report embeddings.

    Args:
        report_embeddings: (B, D).

    Returns:
        (B, B) in [-1, 1].
    """
    return _cosine(report_embeddings, report_embeddings)


def retrieved_evidence(xray_features: Tensor) -> Tensor:
    """Return the cosines of the retrieved X-rays' expert features.

    Args:
        xray_features: (B, D), the retrieved target of each study.

    Returns:
        (B, B) in [-1, 1].
    """
    return _cosine(xray_features, xray_features)


def ema_evidence(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Return the image-report cosines of an exponential-moving-average copy of the model.

    Args:
        image_features: (B, D) from the copy.
        text_features: (B, D) from the copy.

    Returns:
        (B, B) in [-1, 1]; not symmetric.
    """
    return _cosine(image_features, text_features)


def findings_evidence(findings: Tensor, known: Tensor | None = None) -> Tensor:
    """Return whether the findings extracted from two reports are the same set (the empty set if both are normal).

    Args:
        findings: (B, F), 1 present, 0 absent, -1 uncertain, NaN not mentioned; extracted from texts, never labels.
        known: (B,) bool, False for a study without text, which agrees with no other. Default: all True.

    Returns:
        (B, B), 1 if both have the same present and the same uncertain findings, else 0.
    """
    state = torch.nan_to_num(findings.detach().float(), nan=0.0)
    _, group = torch.unique(state, dim=0, return_inverse=True)
    agree: Tensor = group[:, None] == group[None, :]
    if known is not None:
        agree &= known[:, None] & known[None, :]
    return agree.float()


def suspects(evidence: Tensor, threshold: float) -> Tensor:
    """Return (B, B) bool: whether the evidence reaches the threshold, up to `TOLERANCE`."""
    return evidence >= threshold - TOLERANCE


def identify(
    evidence: Mapping[str, Tensor],
    thresholds: Mapping[str, float],
    combine: Literal["any", "all"] = "any",
) -> tuple[Tensor, Tensor]:
    """Return the suspected pairs according to several kinds of evidence, and their strength on a common scale.

    Args:
        evidence: (B, B) by kind; kinds without a threshold are ignored.
        thresholds: Threshold per enabled kind (`EvidenceKind`).
        combine: Whether any kind or all kinds must pass.

    Returns:
        Suspects (B, B) bool, and strength (B, B) in [0, 1]: (evidence - threshold) / (1 - threshold), the maximum over
        kinds for "any", the minimum for "all", and 0 for pairs that are not suspected. Binary evidence, whose threshold is
        its maximum, has strength 1 if it passes.

    Raises:
        ValueError: There are no thresholds, or one without evidence.
    """
    if missing := sorted(set(thresholds) - set(evidence)):
        raise ValueError(
            f"identify got thresholds but no evidence for {', '.join(missing)}; expected evidence for every threshold"
        )
    if not thresholds:
        raise ValueError("identify got no thresholds; expected one for at least one kind of evidence")
    passed, strengths = [], []
    for kind, threshold in thresholds.items():
        values = evidence[kind].detach()
        passed.append(suspects(values, threshold))
        margin = 1 - threshold
        strengths.append(
            ((values - threshold) / margin).clamp(0, 1) if margin > TOLERANCE else passed[-1].to(values.dtype)
        )
    every, strength = torch.stack(passed), torch.stack(strengths)
    suspected = every.any(dim=0) if combine == "any" else every.all(dim=0)
    joined = strength.amax(dim=0) if combine == "any" else strength.amin(dim=0)
    return suspected, joined * suspected


@dataclass(frozen=True)
class Correction:
    """Corrected inputs of `contrastive_loss`, with the suspected and corrected pairs.

    Attributes:
        targets: (B, B) image i to text j, rows sum to 1.
        text_targets: (B, B) text i to image j, rows sum to 1.
        denominator: (B, B) bool, image i to text j; False is excluded from the denominators.
        suspected: (), number of suspected pairs (ordered, without true positives).
        corrected: (), number of corrected pairs.
        pairs: (B, B) bool, the suspected pairs (without true positives).
        chosen: (B, B) bool, the corrected pairs.
        order: (B, B) int64, rank of the suspected pairs (`pair_order.pair_order`); -1 for all others.
    """

    targets: Tensor
    text_targets: Tensor
    denominator: Tensor
    suspected: Tensor
    corrected: Tensor
    pairs: Tensor
    chosen: Tensor
    order: Tensor


def _strongest(order: Tensor, limit: Tensor) -> Tensor:
    """Choose the strongest candidates of each row.

    Equal pairs (several images of the same two studies) are either all chosen or, if they do not all fit, none.

    Args:
        order: (B, B) of `pair_order`.
        limit: (B, 1) int64, maximum number per row, at most B // 2.

    Returns:
        (B, B) bool.
    """
    first = order.topk(order.shape[1] // 2 + 1, dim=1).values
    return order > first.gather(1, limit)  # the first that does not fit, or -1


@torch.no_grad()
def correct(
    targets: Tensor,
    suspects: Tensor,
    evidence: Tensor,
    mode: CorrectionMode,
    weight: float = 0.5,
    watch: bool = False,
    *,
    identity: Tensor,
) -> Correction:
    """Correct suspected false negatives.

    True positives (targets above 0: the diagonal and pairs of one study) are never corrected. In each row and each column,
    at most half of the negatives are corrected, the strongest first. Ties are broken by a hash of the study ids
    (`pair_order`), which is the same for (i, j) and (j, i). So symmetric evidence is corrected symmetrically, and both
    directions of the loss exclude the same pairs.

    Args:
        targets: (B, B) true positives, rows sum to 1 (`contrastive.study_targets`).
        suspects: (B, B) bool.
        evidence: (B, B) in [0, 1], such as the strength of `identify`.
        mode: `relabel`: a corrected pair is a positive with `weight`, relative to 1 for a true pair; `soft`: with its
            evidence as weight; `mask`: it is excluded from the denominator.
        weight: Weight of `relabel`, in (0, 1].
        watch: Count the pairs without correcting them (warm-up).
        identity: (B,) int64, a hash of each row's study id (`pair_order.study_identity`).

    Returns:
        The correction.

    Raises:
        ValueError: The mode is unknown.
    """
    positives = (targets > 0) | torch.eye(len(targets), dtype=torch.bool, device=targets.device)
    candidates = suspects & ~positives
    order = pair_order(candidates, evidence, identity)
    # Positives are symmetric, so row i has as many negatives as column i.
    limit = ((~positives).count_nonzero(dim=1) // 2)[:, None]
    chosen = _strongest(order, limit) & _strongest(order.T, limit).T
    if watch:
        chosen = torch.zeros_like(chosen)
    denominator = torch.ones_like(chosen)
    weights = targets / targets.diagonal()[:, None]
    if mode == "mask":
        denominator = ~chosen
    elif mode == "relabel":
        weights = weights + chosen * weight
    elif mode == "soft":
        weights = weights + chosen * evidence.to(weights.dtype).clamp(0, 1)
    else:
        raise ValueError(f"correct got mode {mode!r}; expected relabel, mask or soft")
    return Correction(
        targets=weights / weights.sum(dim=1, keepdim=True),
        text_targets=weights.T / weights.T.sum(dim=1, keepdim=True),
        denominator=denominator,
        suspected=candidates.count_nonzero(),
        corrected=chosen.count_nonzero(),
        pairs=candidates,
        chosen=chosen,
        order=order,
    )


def sample_similarities(
    rows: Tensor, columns: Tensor | None = None, study: Tensor | None = None, pairs: int = 1_000_000, seed: int = 0
) -> Tensor:
    """Return cosines of random pairs of different training studies, from which a threshold is computed.

    Args:
        rows: (N, D) training embeddings.
        columns: (N, D). Default: `rows`.
        study: (N,) int64 study codes; pairs of one study are excluded. Default: all differ.
        pairs: Number of draws, with replacement.
        seed: Seed of the draws.

    Returns:
        (n,) cosines, n <= pairs.
    """
    columns = rows if columns is None else columns
    study = torch.arange(len(rows)) if study is None else study.cpu()
    draw = torch.randint(len(rows), (2, pairs), generator=torch.Generator().manual_seed(seed))
    left, right = draw[:, study[draw[0]] != study[draw[1]]]
    parts = []
    for a, b in zip(left.split(16_384), right.split(16_384), strict=True):  # all at once would take gigabytes
        one, other = (F.normalize(side.detach().double(), dim=-1) for side in (rows[a], columns[b]))
        parts.append((one * other).sum(dim=-1))
    return torch.cat(parts) if parts else rows.new_zeros(0)


def threshold_from_quantile(similarities: Tensor | NDArray[np.floating], quantile: float) -> float:
    """Return the threshold that a share of 1 - quantile of training pairs exceeds.

    Args:
        similarities: Cosines of pairs of different training studies, any shape.
        quantile: In (0, 1), such as .99.

    Raises:
        InputError: The quantile is out of range, or there are no pairs.
    """
    values = np.asarray(similarities.detach().cpu() if isinstance(similarities, Tensor) else similarities).reshape(-1)
    values = values[np.isfinite(values)]
    if not 0 < quantile < 1:
        raise InputError(f"false-negative quantile is {quantile}; expected a number between 0 and 1, such as 0.99.")
    if len(values) == 0:
        raise InputError(
            "no training pairs for the false-negative threshold; expected at least two training studies. "
            "Set an absolute threshold instead."
        )
    return float(np.quantile(values, quantile))


@torch.no_grad()
def contradictions(labels: Tensor) -> Tensor:
    """Return the pairs of studies whose labels differ.

    Args:
        labels: (B, F), 1, 0, -1 (uncertain) or NaN (blank).

    Returns:
        (B, B) bool: True if a finding is known (1 or 0) for both and differs.
    """
    opposed = (labels == 1).float() @ (labels == 0).float().T
    return (opposed + opposed.T) > 0


@torch.no_grad()
def identification_quality(
    suspects: Tensor, labels: Tensor, study: Tensor | None = None, contradicted: Tensor | None = None
) -> dict[str, Tensor]:
    """Return counts for precision (hits / suspected) and recall (hits / actual) of the identification, for logging.

    A pair is an actual false negative if both studies have the same label for every finding that is known (1 or 0) for
    both; pairs without such a finding are not scored.

    Args:
        suspects: (B, B) bool.
        labels: (B, F), 1, 0, -1 (uncertain) or NaN (blank).
        study: (B,) int64 study codes; pairs of one study are not scored. Default: all differ.
        contradicted: (B, B) bool, `contradictions` of the labels, if already computed.

    Returns:
        Counts `hits`, `suspected` and `actual`, each () int64 on the device: sum them over the batches of an epoch.
    """
    same = ~(contradictions(labels) if contradicted is None else contradicted)
    known = ((labels == 1) | (labels == 0)).float()
    ids = torch.arange(len(labels), device=labels.device) if study is None else study
    scored = (known @ known.T > 0) & (study_targets(ids) == 0)
    return {
        "hits": (suspects & same & scored).count_nonzero(),
        "suspected": (suspects & scored).count_nonzero(),
        "actual": (same & scored).count_nonzero(),
    }
