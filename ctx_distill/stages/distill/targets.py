"""What stage 2 distils towards: retrieved X-rays, the CT's own projection, or both; and the controls of the former."""

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
        retrieved: of the X-rays that the report retrieves (the paper's teacher).
        projection: of the CT's own frontal projection (**ours**); needs `data.init_args.projection=true`. Where it is
            above 0, a CT without report text is distilled towards its projection alone.
    """

    retrieved: float = 1.0
    projection: float = 0.0

    def __post_init__(self) -> None:
        if min(self.retrieved, self.projection) < 0 or self.retrieved + self.projection <= 0:
            raise InputError(
                f"stage 2: teachers are weighted retrieved {self.retrieved} and projection {self.projection}; expected "
                "weights of 0 or more, one of them above 0."
            )


@dataclass(frozen=True)
class NeighbourSettings:
    """How a CT report's nearest X-rays become one target; see `NeighbourLookup`.

    Attributes:
        k: X-rays a report; at most the pool.
        mode: how they are mixed.
        temperature: of the modes `softmax` and `sample`.
        rerank: prefer X-rays whose findings agree with the report's (**ours**); the index must hold findings.
        subset_share: share of the steps in which a random subset of the report's sentences asks in place of the whole
            (**ours**): another target each time.
        control: for the ablation alone. `shuffled`: each X-ray stands for a random other. `oracle`: the k X-rays whose
            labels are nearest the CT's labels; it reads labels, so it is a bound and no method.
        control_seed: of either control; None: the run's seed.
        oracle_manifest: the X-ray manifest that the index was built from, for the pool's labels.
        lookup: `live`: each step's views of the reports are embedded, searched and fetched; `static`: those of all
            training and validation rows, whole, once before the training, with the same result.
        placement: `replicated`: each rank searches the whole index, which ranks of one host share in memory where it
            lies on the CPU; `sharded`: each rank holds a part of the keys and searches it exactly (`ShardedIndex`).
        device: where the index lies: `auto` is the GPU where FAISS has one.
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
                f"stage 2: neighbours.lookup is static, but subset_share is {self.subset_share} and mode is {self.mode}: "
                "targets that are computed once cannot change from step to step. Set lookup=live, or subset_share=0 and "
                "a mode other than sample."
            )
        if self.control == "oracle" and self.oracle_manifest is None:
            raise InputError(
                "stage 2: neighbours.control is oracle, but neighbours.oracle_manifest names no X-ray manifest. Give "
                "the one that the index was built from."
            )

    def seed_of_control(self) -> int:
        """Return the seed of the controls' draws."""
        return run_seed() if self.control_seed is None else self.control_seed


class RetrievedTeacher:
    """u*_i: the mix of the X-rays that a report retrieves.

    Where the index is sharded, calls are collective: every rank makes them, whatever its rows.

    Args:
        store: the X-ray index.
        settings: how.
        vocabulary: findings that are read from the CT reports for the re-rank.
        queries: embeds the reports as the index is asked.

    Raises:
        InputError: the re-rank is asked of an index without findings, or the vocabulary lacks one of the index's.
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
        """Look all rows up, once; from then on they are not looked up again. Collective: ranks share the work.

        The result takes 4 D_v bytes per row on every rank: 2 KB at D_v = 512. `live` keeps nothing of it.

        Args:
            rows: N manifest rows, the same on every rank.
            reports: their N whole reports.
            device: to embed on.
            batch: rows of a lookup.
        """
        share = -(-len(rows) // world_size())
        own, found = slice(rank() * share, (rank() + 1) * share), []
        for start in range(0, share, batch):  # equally often on every rank
            numbers, texts = rows[own][start : start + batch], reports[own][start : start + batch]
            found.append(self._live(torch.tensor(numbers, dtype=torch.int64, device=device), texts, texts))
        whole = gather_with_gradient(torch.cat(found)).cpu() if found else torch.zeros(0)
        self._static = dict(zip(rows, whole, strict=True))

    def targets(self, rows: Tensor, reports: Sequence[str], views: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """(b, D_v) unit rows on the rows' device; zero where there is no text.

        Args:
            rows: (b,) manifest rows.
            reports: b whole reports.
            views: b texts that ask: the report, or a part of it.
            seeds: b, of the draws of mode `sample`.
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
        known, told = [bool(view) for view in views], [view for view in views if view]
        asked = torch.tensor(known, dtype=torch.bool, device=rows.device)
        queries = self._queries.embed(rows, reports, views)[asked]
        features = torch.zeros(len(known), self.lookup.store.value_dim, device=rows.device)
        draws = None
        if seeds is not None and self.lookup.mode == "sample":
            draws = torch.tensor(
                [random.Random(seed).random() for seed, view in zip(seeds, views, strict=True) if view]
            )
        found = self.lookup.look_up(queries, None if self._reader is None else self._reader.extract(told), draws)
        features[asked] = found["features"].to(features)
        return features


class OracleTeacher:
    """Control of the ablation: the mean of the k X-rays whose labels are nearest the CT's. It reads labels.

    Near is the Jaccard index of the sets of findings labelled 1 (1 where both are empty); among equals a random order,
    of its own for each CT, decides.

    Args:
        store: the X-ray index.
        settings: k, control_seed and oracle_manifest.
        finding_names: the columns of the CT's labels.

    Raises:
        InputError: the manifest is not the index's, or shares no finding with the CTs.
    """

    def __init__(self, store: XrayIndexArtefact, settings: NeighbourSettings, finding_names: Sequence[str]) -> None:
        pool = read_manifest(Path(settings.oracle_manifest or ""), check_images=False)
        require_same(
            f"the X-ray manifest {pool.path}", pool.fingerprint,
            f"the manifest that the index {store.folder} was built from", store.upstream["xray-manifest"],
            "Give neighbours.oracle_manifest the X-ray manifest of stage 1.",
        )  # fmt: skip
        shared = [name for name in finding_names if name in pool.finding_names]
        if not shared:
            raise InputError(
                f"{pool.path}: shares no label:<finding> column with the CT manifest, so the oracle has nothing to "
                "compare. Use another control."
            )
        self._own = [list(finding_names).index(name) for name in shared]
        labels = pool.labels()[:, [pool.finding_names.index(name) for name in shared]]
        self._pool = torch.from_numpy(labels[store.items["row"].to_numpy()] == 1).double()
        self.store, self.k, self.seed = store, min(settings.k, len(store)), settings.seed_of_control()

    def positions(self, labels: Tensor, rows: Sequence[int]) -> Tensor:
        """(b, k) places in the index, on the CPU, of CTs with labels (b, F) and their manifest rows."""
        own = (labels.cpu()[:, self._own] == 1).double()
        both = own @ self._pool.T
        either = own.sum(1)[:, None] + self._pool.sum(1)[None] - both
        jaccard = torch.where(either > 0, both / either.clamp_min(1), 1.0)
        # Two Jaccard indices over F findings differ by 1 / F^2 at least.
        tie = torch.stack([self._order(row) for row in rows]) * (0.5 / len(self._own) ** 2)
        return (jaccard + tie).topk(self.k, dim=1).indices

    def _order(self, row: int) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + row)
        return torch.rand(len(self.store), generator=draw, dtype=torch.float64)

    def targets(self, batch: CTBatch) -> Tensor:
        """(b, D_v) unit rows.

        Raises:
            InputError: the batch carries no labels.
        """
        if batch.labels is None:
            raise InputError(
                "stage 2: neighbours.control is oracle, but the batches carry no labels. Set "
                "data.init_args.with_labels=true."
            )
        positions = self.positions(batch.labels, batch.row.tolist())
        return mix_neighbours(self.store.values(positions)).to(batch.row.device)


class ProjectionTeacher:
    """u'_i = norm(E_v(projection of V_i)): the CT's own digital radiograph through the frozen expert (**ours**).

    Attributes:
        features: what is kept of them.

    Args:
        memory_gb: gigabytes of them to keep in memory, 4 D_e bytes per row (2 KB at D_e = 512); further ones are computed
            again.
    """

    def __init__(self, memory_gb: float = MEMORY_GB) -> None:
        self.features = RowFeatures(CacheSettings(memory_gb=memory_gb, disk_gb=0))

    def targets(self, batch: CTBatch, expert: XrayExpert) -> Tensor:
        """(b, D_e) unit rows; each row is embedded once, since the projection is of the file, before augmentation.

        Raises:
            InputError: the batch carries no projections.
        """
        features = self.features.get(batch.row.tolist(), lambda new: embed_projection(batch, expert, new))
        return features.to(batch.row.device)


def embed_projection(batch: CTBatch, expert: XrayExpert, places: slice = slice(None)) -> Tensor:
    """Expert features (b, D_e), unit rows, of a batch's projections, or of those at some places.

    Raises:
        InputError: the batch carries no projections.
    """
    if batch.projection is None:
        raise InputError(
            "the CTs' own projections are asked for, but the batches carry none. Set data.init_args.projection=true."
        )
    return F.normalize(expert.encode_image(expert.preprocess_batch(batch.projection[places])), dim=-1)
