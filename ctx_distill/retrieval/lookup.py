"""Compute teacher targets from CT reports: search, re-rank, weight and mix the nearest X-rays (method, stages 1 and 2)."""

from __future__ import annotations

from typing import Literal, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from ctx_distill.retrieval.store import XrayIndexArtefact
from ctx_distill.types import InputError

LookupMode = Literal["nearest", "mean", "softmax", "sample"]


class Neighbours(TypedDict):
    """The result of a lookup.

    Keys:
        features: (B, D_v) unit rows, the teacher targets.
        positions: (B, k) int64, most similar (or best agreeing) first.
        weights: (B, k), each neighbour's weight in `features`; rows sum to 1.
        similarity: (B, k), similarity of key and query.
    """

    features: Tensor
    positions: Tensor
    weights: Tensor
    similarity: Tensor


class NeighbourLookup:
    """Look up teacher targets of CT studies in an X-ray index.

    Args:
        store: The index artefact.
        k: Neighbours per query.
        mode: `nearest`: the first neighbour only; `mean`: equal weights; `softmax`: weights
            softmax(similarity / temperature); `sample`: one neighbour, drawn with these weights.
        temperature: Temperature of `softmax` and `sample`.
        findings_rerank: Search for `candidates` neighbours and prefer those whose findings agree with the CT's (**ours**:
            findings visible on an X-ray must agree in sign); ties are broken by similarity.
        visible: (F,) bool, whether a finding is visible on an X-ray. Default: all.
        candidates: Neighbours for the re-rank. Default: 8 k, at least 32.
        shuffle_seed: Control: each X-ray is replaced by another, random but fixed one of the pool. None disables it.

    Raises:
        InputError: The pool is smaller than k, or the re-rank is enabled but the index has no findings.
    """

    def __init__(
        self,
        store: XrayIndexArtefact,
        k: int = 8,
        mode: LookupMode = "mean",
        temperature: float = 0.07,
        findings_rerank: bool = False,
        visible: Tensor | None = None,
        candidates: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        if mode not in ("nearest", "mean", "softmax", "sample"):
            raise ValueError(f"lookup mode is {mode!r}; expected nearest, mean, softmax or sample")
        if temperature <= 0:
            raise ValueError(f"lookup temperature is {temperature}; expected a positive number")
        if not 1 <= k <= len(store):
            raise InputError(
                f"{k} neighbours requested from an index of {len(store)} X-rays; expected 1 to {len(store)}."
            )
        if findings_rerank and store.findings is None:
            raise InputError(
                f"{store.folder}: the findings re-rank needs the pool's findings, but this index was built without them. "
                "Rebuild it with findings, or disable the re-rank."
            )
        self.store, self.k, self.mode, self.temperature = store, k, mode, temperature
        self.findings_rerank, self.visible = findings_rerank, visible
        self.candidates = min(len(store), max(k, candidates if candidates is not None else max(8 * k, 32)))
        self.permutation: Tensor | None = None
        if shuffle_seed is not None:
            # One random cycle through the pool, so that no X-ray is mapped to itself.
            order = torch.randperm(len(store), generator=torch.Generator().manual_seed(shuffle_seed))
            self.permutation = torch.empty_like(order).scatter_(0, order, order.roll(1))

    @torch.no_grad()
    def look_up(self, queries: Tensor, findings: Tensor | None = None, draws: Tensor | None = None) -> Neighbours:
        """Look up one batch.

        Args:
            queries: (B, D_k) unit rows, the reports in the key space.
            findings: (B, F) findings of the CT reports (1, 0, -1 uncertain, NaN), in the index's order; required for the
                re-rank.
            draws: (B,) uniform in [0, 1), one per query for `sample`. Default: drawn from torch's generator.

        Returns:
            The targets, with positions, weights and similarities.
        """
        similarity, positions = self.store.search(queries, self.candidates if self.findings_rerank else self.k)
        if self.findings_rerank and self.store.findings is not None:
            if findings is None:
                raise ValueError("lookup with findings_rerank got no findings; expected (B, F)")
            similarity, positions = self._rerank(similarity, positions, findings, self.store.findings)
        weights = self._weights(similarity, draws)
        if self.permutation is not None:
            positions = self.permutation[positions.cpu()].to(positions.device)
        # In float64, because the last bits of a float32 sum depend on the number of rows.
        mixed = (self.store.values(positions).double() * weights[..., None].double()).sum(dim=1)
        return {
            "features": F.normalize(mixed, dim=-1).float(),
            "positions": positions,
            "weights": weights,
            "similarity": similarity,
        }

    def _rerank(
        self, similarity: Tensor, positions: Tensor, findings: Tensor, pool_findings: Tensor
    ) -> tuple[Tensor, Tensor]:
        pool = pool_findings[positions.cpu()].to(positions.device)
        query = findings.to(positions.device)[:, None]
        # A finding that is not mentioned counts as absent; uncertain findings are not compared.
        differs = ((query == 1) != (pool == 1)) & (query != -1) & (pool != -1)
        if self.visible is not None:
            differs &= self.visible.to(positions.device)
        # Neighbours are ordered by similarity, so a stable sort by disagreement breaks ties by similarity.
        order = differs.sum(dim=-1).argsort(dim=1, stable=True)[:, : self.k]
        return similarity.gather(1, order), positions.gather(1, order)

    def _weights(self, similarity: Tensor, draws: Tensor | None) -> Tensor:
        if self.mode == "mean":
            return torch.full_like(similarity, 1 / similarity.shape[1])
        if self.mode == "softmax":
            return (similarity / self.temperature).softmax(dim=1)
        chosen = torch.zeros(len(similarity), dtype=torch.int64)
        if self.mode == "sample" and len(similarity):
            cumulative = (similarity.cpu().double() / self.temperature).softmax(dim=1).cumsum(dim=1)
            draws = torch.rand(len(similarity)) if draws is None else draws
            chosen = torch.searchsorted(cumulative, draws.double()[:, None], right=True)[:, 0]
            chosen = chosen.clamp_max(similarity.shape[1] - 1)  # the last sum may be slightly below 1
        return F.one_hot(chosen, similarity.shape[1]).to(similarity)
