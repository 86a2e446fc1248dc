"""Distillation targets of stage 2: retrieved X-rays, the CT's own projection, or both, and the ablation controls."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ctx_distill.checkpoint import require_same
from ctx_distill.data.manifests.manifest import read_manifest
from ctx_distill.distributed import gather_with_gradient, rank, world_size
from ctx_distill.errors import InputError
from ctx_distill.losses.distillation import mix_neighbours
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.retrieval.index import Device, Placement
from ctx_distill.retrieval.lookup import LookupMode, NeighbourLookup
from ctx_distill.retrieval.store import XrayIndexArtefact
from ctx_distill.seeds import run_seed
from ctx_distill.stages.shared.report_findings import FindingsReader
from ctx_distill.training.row_features import MEMORY_GB, CacheSettings, ReportFeatures, RowFeatures
from ctx_distill.types import CTBatch


@dataclass(frozen=True)
class TeacherSettings:
    """Weights of the two teachers: u_i = norm(retrieved * u*_i + projection * u'_i).

    Attributes:
        retrieved: Weight of the X-rays that the report retrieves (the paper's teacher).
        projection: Weight of the CT's own frontal projection (**ours**); requires `data.init_args.projection=true`. If
            it is above 0, a CT without report text is distilled towards its projection only.

    Raises:
        InputError: a weight is negative, or both are 0.
    """

    retrieved: float = 1.0
    projection: float = 0.0

    def __post_init__(self) -> None:
        if min(self.retrieved, self.projection) < 0 or self.retrieved + self.projection <= 0:
            raise InputError(
                f"stage 2: teachers.retrieved is {self.retrieved} and teachers.projection is {self.projection}; expected "
                "weights of 0 or more, at least one of them above 0."
            )


@dataclass(frozen=True)
class NeighbourSettings:
    """How a CT report's nearest X-rays are combined into one target; see `NeighbourLookup`.

    Attributes:
        k: X-rays per report; at most the pool size.
        mode: How they are mixed.
        temperature: Of the modes `softmax` and `sample`.
        rerank: Prefer X-rays whose findings agree with the report's (**ours**); the index must have findings.
        subset_share: Probability that a step queries with a random subset of the report's sentences instead of the
            complete report (**ours**), which varies the target.
        control: For the ablation only. `shuffled`: each X-ray is replaced by a random other one. `oracle`: the k X-rays
            whose labels are most similar to the CT's. The oracle reads labels: it is an upper bound, not a method.
        control_seed: Seed of either control; None uses the run's seed.
        oracle_manifest: The X-ray manifest that the index was built from, for the pool's labels.
        lookup: `live` embeds and looks up each step's views of the reports. `static` looks up the complete reports of
            all training and validation rows once, before training, with the same result.
        placement: `replicated`: each rank searches the complete index; on the CPU, ranks of one host share its memory.
            `sharded`: each rank holds a part of the keys and searches it exactly (`ShardedIndex`).
        device: Device of the index; `auto` uses the GPU if FAISS supports it.

    Raises:
        InputError: a setting is out of range, or two settings are incompatible.
    """

    k: int = 8
    mode: LookupMode = "mean"
    temperature: float = 0.07
    rerank: bool = False
    subset_share: float = 0.0
    control: Literal["none", "shuffled", "oracle"] = "none"
    control_seed: int | None = None
    oracle_manifest: str | None = None
    lookup: Literal["live", "static"] = "live"
    placement: Placement = "replicated"
    device: Device = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.subset_share <= 1:
            raise InputError(f"stage 2: neighbours.subset_share is {self.subset_share}; expected a share from 0 to 1.")
        if self.lookup == "static" and (self.subset_share > 0 or self.mode == "sample"):
            raise InputError(
                f"stage 2: neighbours.lookup is static, but subset_share is {self.subset_share} and mode is {self.mode}; "
                "static targets cannot change from step to step. Set lookup=live, or subset_share=0 and a mode other "
                "than sample."
            )
        if self.control == "oracle" and self.oracle_manifest is None:
            raise InputError(
                "stage 2: neighbours.control is oracle, but neighbours.oracle_manifest is not set. Set it to the X-ray "
                "manifest that the index was built from."
            )

    def seed_of_control(self) -> int:
        """Return the seed of the controls' draws."""
        return run_seed() if self.control_seed is None else self.control_seed


class RetrievedTeacher:
    """Compute u*_i, the mix of the X-rays that a report retrieves.

    With a sharded index, calls are collective: every rank must make them, even without rows.

    Args:
        store: The X-ray index.
        settings: How X-rays are retrieved and mixed.
        vocabulary: Findings to extract from the CT reports for the re-rank.
        queries: Embeds the reports as queries of the index.

    Raises:
        InputError: The re-rank is enabled but the index has no findings, or the vocabulary lacks one of them.
    """

    def __init__(
        self, store: XrayIndexArtefact, settings: NeighbourSettings, vocabulary: str, queries: ReportFeatures
    ) -> None:
        self._reader = FindingsReader(store, vocabulary) if settings.rerank else None
        self._queries = queries
        self._static: dict[int, Tensor] | None = None
        self.lookup = NeighbourLookup(
            store,
            min(settings.k, len(store)),
            settings.mode,
            settings.temperature,
            findings_rerank=self._reader is not None,
            visible=None if self._reader is None else self._reader.visible,
            shuffle_seed=settings.seed_of_control() if settings.control == "shuffled" else None,
        )

    def prepare(self, rows: Sequence[int], reports: Sequence[str], device: torch.device, batch: int = 64) -> None:
        """Look up all rows once, distributed over the ranks (collective); `targets` then uses the stored result.

        The result takes 4 D_v bytes per row on every rank (2 KB at D_v = 512).

        Args:
            rows: N manifest rows, the same on every rank.
            reports: Their N complete reports.
            device: Device that embeds the reports.
            batch: Rows per lookup.
        """
        share = -(-len(rows) // world_size())
        local, parts = slice(rank() * share, (rank() + 1) * share), []
        for start in range(0, share, batch):  # the same number of iterations on every rank
            numbers, texts = rows[local][start : start + batch], reports[local][start : start + batch]
            parts.append(self._live(torch.tensor(numbers, dtype=torch.int64, device=device), texts, texts))
        targets = gather_with_gradient(torch.cat(parts)).cpu() if parts else torch.zeros(0)
        self._static = dict(zip(rows, targets, strict=True))

    def targets(self, rows: Tensor, reports: Sequence[str], views: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Return the targets, (b, D_v) unit rows on the device of `rows`; zero for an empty view.

        Args:
            rows: (b,) manifest rows.
            reports: b complete reports.
            views: b query texts: each the report or a part of it.
            seeds: b seeds for the draws of mode `sample`.
        """
        if self._static is None:
            return self._live(rows, reports, views, seeds)
        nothing = torch.zeros(self.lookup.store.value_dim)
        kept = [self._static[row] if view else nothing for row, view in zip(rows.tolist(), views, strict=True)]
        return torch.stack(kept).to(rows.device)

    @torch.no_grad()
    def _live(
        self, rows: Tensor, reports: Sequence[str], views: Sequence[str], seeds: Sequence[int] | None = None
    ) -> Tensor:
        texts = [view for view in views if view]
        has_text = torch.tensor([bool(view) for view in views], dtype=torch.bool, device=rows.device)
        queries = self._queries.embed(rows, reports, views)[has_text]
        features = torch.zeros(len(views), self.lookup.store.value_dim, device=rows.device)
        draws = None
        if seeds is not None and self.lookup.mode == "sample":
            draws = torch.tensor(
                [random.Random(seed).random() for seed, view in zip(seeds, views, strict=True) if view]
            )
        result = self.lookup.look_up(queries, None if self._reader is None else self._reader.extract(texts), draws)
        features[has_text] = result["features"].to(features)
        return features


class OracleTeacher:
    """Ablation control: the mean of the k X-rays whose labels are most similar to the CT's. It reads labels.

    Similarity is the Jaccard index of the sets of findings labelled 1 (1 if both are empty). Ties are broken by a random
    order per CT.

    Args:
        store: The X-ray index.
        settings: k, control_seed and oracle_manifest.
        finding_names: The columns of the CT's labels.

    Raises:
        InputError: The index was built from another manifest, or the manifest shares no finding with the CTs.
    """

    def __init__(self, store: XrayIndexArtefact, settings: NeighbourSettings, finding_names: Sequence[str]) -> None:
        pool = read_manifest(Path(settings.oracle_manifest or ""), check_images=False)
        require_same(
            f"the X-ray manifest {pool.path}", pool.fingerprint,
            f"the manifest that the index {store.folder} was built from", store.upstream["xray-manifest"],
            "Set neighbours.oracle_manifest to the X-ray manifest of stage 1.",
        )  # fmt: skip
        shared = [name for name in finding_names if name in pool.finding_names]
        if not shared:
            raise InputError(
                f"{pool.path}: has no label:<finding> column in common with the CT manifest; the oracle needs at least "
                "one. Use another control."
            )
        self._columns = [list(finding_names).index(name) for name in shared]
        labels = pool.labels()[:, [pool.finding_names.index(name) for name in shared]]
        self._pool = torch.from_numpy(labels[store.items["row"].to_numpy()] == 1).double()
        self.store, self.k, self.seed = store, min(settings.k, len(store)), settings.seed_of_control()

    def positions(self, labels: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the index positions (b, k), on the CPU, for CTs with labels (b, F) and b manifest rows."""
        positive = (labels.cpu()[:, self._columns] == 1).double()
        both = positive @ self._pool.T
        either = positive.sum(1)[:, None] + self._pool.sum(1)[None] - both
        jaccard = torch.where(either > 0, both / either.clamp_min(1), 1.0)
        # Different Jaccard indices over F findings differ by at least 1 / F^2.
        tie = torch.stack([self._order(row) for row in rows]) * (0.5 / len(self._columns) ** 2)
        return (jaccard + tie).topk(self.k, dim=1).indices

    def _order(self, row: int) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + row)
        return torch.rand(len(self.store), generator=draw, dtype=torch.float64)

    def targets(self, batch: CTBatch) -> Tensor:
        """Return the targets of a batch, (b, D_v) unit rows.

        Raises:
            InputError: The batch contains no labels.
        """
        if batch.labels is None:
            raise InputError(
                "stage 2: neighbours.control is oracle, but the batches contain no labels. Set "
                "data.init_args.with_labels=true."
            )
        positions = self.positions(batch.labels, batch.row.tolist())
        return mix_neighbours(self.store.values(positions)).to(batch.row.device)


class ProjectionTeacher:
    """Compute u'_i = norm(E_v(projection of V_i)), the frozen expert's embedding of the CT's own projection (**ours**).

    Attributes:
        features: The cache of computed features.

    Args:
        memory_gb: Size of the cache in gigabytes, at 4 D_e bytes per row (2 KB at D_e = 512). Features that do not fit
            are recomputed.
    """

    def __init__(self, memory_gb: float = MEMORY_GB) -> None:
        self.features = RowFeatures(CacheSettings(memory_gb=memory_gb, disk_gb=0))

    def targets(self, batch: CTBatch, expert: XrayExpert) -> Tensor:
        """Return the targets of a batch, (b, D_e) unit rows.

        The projection is computed from the file, before augmentation, so a row's features never change.

        Raises:
            InputError: The batch contains no projections.
        """
        features = self.features.get(batch.row.tolist(), lambda new: embed_projection(batch, expert, new))
        return features.to(batch.row.device)


def embed_projection(batch: CTBatch, expert: XrayExpert, places: slice = slice(None)) -> Tensor:
    """Return the expert's features (b, D_e), unit rows, of a batch's projections, or of those at `places`.

    Raises:
        InputError: The batch contains no projections.
    """
    if batch.projection is None:
        raise InputError(
            "the settings need the CTs' projections, but the batches contain none. Set data.init_args.projection=true."
        )
    return F.normalize(expert.encode_image(expert.preprocess_batch(batch.projection[places])), dim=-1)
