"""Distillation from a frozen X-ray expert: pair-wise and semantic relation losses (BIUD, arXiv 2404.04936; form **ours**).

    L_pair = mean_i (1 - <h_i, u_i>)
    p*_i = softmax(u_i A^T / tau),  p_i = softmax(h_i A^T / tau),  L_rel = mean_i KL(p*_i || p_i)

h_i is the student's projected and normalised embedding, u_i the teacher's, and A are anchors in the space of u: report
embeddings of the global batch, findings prompts, or a bank of pool image features. The functions expect the global batch:
gather student and teacher first (`ctx_distill.distributed`). With two teachers (**ours**), u_i is their normalised weighted
mean (`mix_neighbours`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ctx_distill.losses.contrastive import working_precision

NEAR_UNIFORM = 0.95
"""Share of log K above which the entropy of p* is reported as nearly uniform; use a smaller tau then."""


def mix_neighbours(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the normalised weighted mean of several neighbours or teachers.

    Args:
        values: (B, k, D), unit rows.
        weights: (B, k), non-negative, not all 0 in a row. Default: equal weights.

    Returns:
        (B, D), unit rows.
    """
    values = working_precision(values)
    mixed = values.mean(dim=1) if weights is None else (values * weights.to(values)[..., None]).sum(dim=1)
    return F.normalize(mixed, dim=-1)


def scheduled(start: float, end: float | None, progress: float, kind: Literal["linear", "geometric"]) -> float:
    """Return a scheduled weight or temperature (**ours**).

    Args:
        start: Value at progress 0.
        end: Value at progress 1; None keeps `start`.
        progress: Training progress, in [0, 1].
        kind: Interpolate the value (`linear`) or its logarithm (`geometric`, both ends positive).
    """
    if end is None:
        return start
    if kind == "geometric":
        return float(start * (end / start) ** progress)
    return start + (end - start) * progress


def pair_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return mean_i (1 - cos(student_i, teacher_i)), ().

    Args:
        student: (B, D).
        teacher: (B, D), detached.
    """
    student, teacher = working_precision(student), working_precision(teacher).detach()
    return (1 - (F.normalize(student, dim=-1) * F.normalize(teacher, dim=-1)).sum(dim=-1)).mean()


def relation_loss(student: Tensor, teacher: Tensor, anchors: Tensor, tau: float) -> dict[str, Tensor]:
    """Return mean_i KL(p*_i || p_i) over anchors.

    Args:
        student: (B, D).
        teacher: (B, D), detached.
        anchors: (K, D) in the teacher's space.
        tau: Temperature; if it is larger than the expert's, p* is nearly uniform.

    Returns:
        `relation`; `target_entropy`, the mean entropy of p* in nats; `target_entropy_share`, the entropy divided by log K;
        `target_near_uniform`, 1 if the share is above `NEAR_UNIFORM`, else 0. Each (); only `relation` has a gradient.

    Raises:
        ValueError: Tau is not positive, or there are fewer than two anchors, or they have another dimension.
    """
    if tau <= 0:
        raise ValueError(f"relation_loss got tau {tau}; expected a positive number, such as the expert's temperature")
    if anchors.ndim != 2 or anchors.shape[1] != teacher.shape[1] or len(anchors) < 2:
        raise ValueError(
            f"relation_loss got anchors {tuple(anchors.shape)} for teacher features {tuple(teacher.shape)}; "
            "expected at least two anchors of the same dimension"
        )
    student = F.normalize(working_precision(student), dim=-1)
    teacher = F.normalize(working_precision(teacher).detach(), dim=-1).to(student)
    anchors = F.normalize(working_precision(anchors), dim=-1).to(student)
    log_p = F.log_softmax(student @ anchors.T / tau, dim=-1)
    with torch.no_grad():
        log_target = F.log_softmax(teacher @ anchors.T / tau, dim=-1)
        target = log_target.exp()
        entropy = -(target * log_target).sum(dim=-1).mean()
        share = entropy / math.log(len(anchors))
    return {
        "relation": (target * (log_target - log_p)).sum(dim=-1).mean(),
        "target_entropy": entropy,
        "target_entropy_share": share,
        "target_near_uniform": (share > NEAR_UNIFORM).to(entropy.dtype),
    }


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    anchors: Tensor | None,
    tau: float,
    weights: Mapping[str, float],
) -> dict[str, Tensor]:
    """Return w_pair L_pair + w_rel L_rel.

    Args:
        student: (B, D), the student's projected embeddings; normalised here.
        teacher: (B, D), the teacher's embeddings, detached.
        anchors: (K, D) in the teacher's space; None disables the relation term.
        tau: Temperature of the relation term.
        weights: `pair` and `relation`; a missing one is 0. Terms of weight 0 are still returned, for logging.

    Returns:
        `pair`, `total`, and with anchors the results of `relation_loss`. Each ().

    Raises:
        ValueError: Shapes do not match, a weight has an unknown name, or `relation` has a weight but no anchors.
    """
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"distillation_loss got student {tuple(student.shape)} and teacher {tuple(teacher.shape)}; "
            "expected the same shape (B, D)"
        )
    if unknown := sorted(set(weights) - {"pair", "relation"}):
        raise ValueError(f"distillation_loss got weights for {', '.join(unknown)}; expected pair and relation")
    if anchors is None and weights.get("relation", 0.0) != 0:
        raise ValueError("distillation_loss got a relation weight but no anchors; expected anchors or weight 0")
    with torch.autocast(student.device.type, enabled=False):
        terms = {"pair": pair_loss(student, teacher)}
        if anchors is not None:
            terms |= relation_loss(student, teacher, anchors, tau)
        zero = terms["pair"].new_zeros(())
        parts = [weights[name] * terms[name] for name in ("pair", "relation") if weights.get(name, 0.0) != 0]
        terms["total"] = torch.stack(parts).sum() if parts else zero
    return terms
