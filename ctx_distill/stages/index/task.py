"""Stage 1: embed the X-ray pool with the frozen expert, build the FAISS index, and measure the retrieval."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from ctx_distill.data.loading.datamodules import XrayDataModule
from ctx_distill.data.manifests.manifest import Manifest
from ctx_distill.distributed import barrier, gather_objects, rank, run_on_rank_zero, world_size
from ctx_distill.errors import InputError
from ctx_distill.files import hash_json
from ctx_distill.models.opening import open_expert
from ctx_distill.models.report_encoder import FrozenReportEncoder, ReportEncoder, open_report_encoder
from ctx_distill.models.weights import HUB
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.retrieval.index import IndexKind
from ctx_distill.retrieval.keys import KeyKind, make_keys, share_keys
from ctx_distill.retrieval.shards import kept_rows, merge_shards, open_shards, standing_blocks, write_shard
from ctx_distill.retrieval.store import ReportSource, XrayIndexArtefact, write_index_artefact
from ctx_distill.run_files import ARTEFACT
from ctx_distill.stages.index.quality import held_out_studies, measure_retrieval
from ctx_distill.stages.shared.report_findings import FindingsReader
from ctx_distill.stages.shared.shared_extraction import extract_shared
from ctx_distill.text.extractor import load_vocabulary
from ctx_distill.training.base_task import StageTask, stop_if_asked
from ctx_distill.types import XrayBatch


class IndexTask(StageTask):
    """Build the retrieval index: embed the pool with a predict loop, then index the keys (method, stage 1).

    Args:
        expert: Folder or hub name of the X-ray expert.
        expert_revision: Pinned commit of a hub expert.
        index_kind: Exact search, or an approximate index for large pools.
        minimum_recall: Lowest recall@1, against exact search, that an approximate index may have.
        search_width: Lists visited per query (ivf, default 8), or candidates kept during the graph search (hnsw,
            default 64) of an approximate index. A larger value is slower and raises recall.
        centre: Subtract the pool's mean from the keys, and the mean of the CT `train` reports from the queries. This
            removes the style shared by all X-ray reports and by all CT reports (**ours**, after Mu and Viswanath 2018,
            "All-but-the-Top").
        neighbours: X-rays per study in `retrieval.csv`.
        key: What a CT report is compared with: the X-ray's report (`text`), its image (`image`), or the mean of both
            cosines (`both`). The latter two need the expert's joint space. X-rays without a report are indexed with
            `image` only.
        report_encoder: Folder or hub name of the encoder that embeds the reports instead of the expert's text tower:
            an expert with a text tower, or a BERT-like encoder. Required for an expert without a text tower; for
            `text` keys only.
        report_encoder_revision: Pinned commit of a hub encoder.
        vocabulary: Findings to extract from the pool's reports for the findings re-rank of later stages; name or YAML
            file.
        part_items: X-rays that a rank embeds before it writes a shard. An interrupted run resumes from the written
            shards, on any number of ranks.

    Raises:
        InputError: Expert, key and report encoder are incompatible.
    """

    def __init__(
        self,
        expert: str,
        expert_revision: str | None = None,
        index_kind: IndexKind = "exact",
        minimum_recall: float = 0.95,
        search_width: int | None = None,
        centre: bool = True,
        neighbours: int = 10,
        key: KeyKind = "text",
        report_encoder: str | None = None,
        report_encoder_revision: str | None = None,
        vocabulary: str = "ct-rate",
        part_items: int = 8192,
    ) -> None:
        super().__init__()
        if part_items < 1:
            raise InputError(f"stage 1: part_items is {part_items}; expected 1 or more, such as 8192.")
        self.part_items = part_items
        self.expert: XrayExpert = open_expert(expert, expert_revision)
        self.separate: FrozenReportEncoder | None = None
        self.report_source: ReportSource | None = None
        if report_encoder is not None:
            self.separate = open_report_encoder(report_encoder, report_encoder_revision)
            place = report_encoder if report_encoder.startswith(HUB) else str(Path(report_encoder).resolve())
            self.report_source = ReportSource(place, report_encoder_revision, self.separate.fingerprint())
        elif not self.expert.has_text:
            raise InputError(
                f"{expert}: this expert has no text tower, so reports cannot be embedded with it. Set a report encoder"
                " with --model.init_args.report_encoder=<folder>, or use an expert with text (open_clip, SigLIP)."
            )
        if key != "text" and (self.separate is not None or not self.expert.has_joint_space):
            reason = (
                f"the reports are embedded by {self.separate.name}" if self.separate is not None
                else f"the expert's images have {self.expert.embed_dim} dimensions, its texts {self.expert.text_dim}, "
                f"its temperature is {self.expert.logit_scale}"
            )  # fmt: skip
            raise InputError(
                f"{expert}: key {key} compares reports with images, which needs both in the joint space of one "
                f"contrastively trained expert, but {reason}. Set --model.init_args.key=text."
            )
        self.key: KeyKind = key
        self.index_kind, self.minimum_recall, self.search_width = index_kind, minimum_recall, search_width
        self.neighbours = neighbours
        self.centre = centre
        self.vocabulary_name, self.vocabulary = vocabulary, load_vocabulary(vocabulary)

    @property
    def reports(self) -> ReportEncoder:
        """The encoder of reports, for keys and queries."""
        return self.separate if self.separate is not None else self.expert

    def describe(self) -> dict[str, Any]:
        """Return a description of the expert, and of the report encoder if it is separate."""
        return {"expert": self.expert.describe()} | self._describe_separate()

    def _describe_separate(self) -> dict[str, Any]:
        if self.separate is None or self.report_source is None:
            return {}
        encoder = {"name": self.separate.name, "revision": self.report_source.revision}
        return {"report_encoder": {**encoder, "fingerprint": self.report_source.fingerprint,
                                   "text_dim": self.separate.text_dim}}  # fmt: skip

    def predict_step(self, batch: XrayBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return the values u_j (B, D_e) and keys v_j (B, D_t) of a batch; with key `image`, the values are the keys."""
        del batch_idx
        values = self.expert.encode_image(batch.image)
        keys = values if self.key == "image" else self.reports.encode_text(batch.report)
        return {"values": values, "keys": keys, "row": batch.row}

    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Embed the pool, merge the ranks' shards, build the index and look up the held-out CT studies."""
        assert isinstance(datamodule, XrayDataModule)
        pool, left_out = self._pool(datamodule)
        datamodule.preprocess, datamodule.preprocess_key = self.expert.preprocess, self.expert.fingerprint()
        shards = folder / "shards"
        first_block = self._embed(trainer, datamodule, pool, shards)
        findings = self._findings(pool)

        def build() -> dict[str, Any]:
            self.to(trainer.strategy.root_device)
            table = merge_shards(shards, [int(row) for row in pool.frame.index], first_block)
            store = self._write(folder / ARTEFACT, table, pool, datamodule, left_out, findings)
            shutil.rmtree(shards)
            metrics = {"pool": len(pool), "left_out": left_out, "key_dim": store.key_dim, "value_dim": store.value_dim}
            if datamodule.ct is None:
                return metrics
            return metrics | self._quality(store, pool, held_out_studies(datamodule.ct))

        # The build takes minutes to hours on a large pool, so the other ranks must not wait in a collective with a timeout.
        return run_on_rank_zero(build) or {}

    def _embed(self, trainer: L.Trainer, datamodule: XrayDataModule, pool: Manifest, shards: Path) -> int:
        """Write the shards of the pool's blocks, except those that an earlier run of the same request has written.

        Returns:
            The first block of this run's layout (`open_shards`).
        """
        ranks = world_size()
        request = {
            "manifest": datamodule.manifest.fingerprint,
            "rows": [int(row) for row in pool.frame.index],
            "expert": self.expert.fingerprint(),
            "reports": self.reports.fingerprint(),
            "key": self.key,
            "batch": datamodule.eval_batch_size,
            "precision": str(trainer.precision),
        }
        # Only rank zero reads what this layout has written so far, because other ranks may already be writing.
        opened: list[int] = []
        if rank() == 0:
            opened = [open_shards(shards, hash_json(request), ranks, self.part_items)]
        (first_block,) = gather_objects(opened)
        kept = kept_rows(shards, first_block)
        pool = pool.where(~np.isin(pool.frame.index.to_numpy(), kept.numpy()))
        size = self.part_items * ranks
        starts = range(0, len(pool), size)
        standing = gather_objects(standing_blocks(shards, ranks, len(starts), first_block) if rank() == 0 else [])
        if standing and rank() == 0:
            print(f"{shards}: {len(standing)} of {len(starts)} parts of the pool are already embedded")
        for block, start in enumerate(starts, first_block):
            if block in standing:
                continue
            stop_if_asked("between two parts of the pool")
            part = pool.where((np.arange(len(pool)) >= start) & (np.arange(len(pool)) < start + size))
            outputs: list[Any] = trainer.predict(self, dataloaders=datamodule.loader(part)) or []
            # The sampler repeats the last item of a block that is not divisible by the number of ranks.
            count = len(range(rank(), len(part), ranks))
            joined = {
                name: torch.cat([output[name] for output in outputs])[:count] for name in ("keys", "values", "row")
            }
            write_shard(shards, rank(), ranks, joined["keys"], joined["values"], joined["row"], block)
        barrier()
        return first_block

    def _pool(self, datamodule: XrayDataModule) -> tuple[Manifest, dict[str, int]]:
        """Return the X-rays to index, and the counts of excluded ones by reason; only `image` keys need no report."""
        pool, left_out = datamodule.pool()
        has_report = pool.has_report()
        if self.key != "image" and not has_report.all():
            pool, left_out = pool.where(has_report), {**left_out, "no report text": int((~has_report).sum())}
        for reason, count in left_out.items():
            if count:
                print(f"index: excluded {count} X-rays ({reason})")
        if not len(pool):
            raise InputError(
                f"{datamodule.manifest.path}: no X-ray to index; all were excluded: {left_out}. Add X-rays with a report,"
                " or set --model.init_args.key=image."
            )
        return pool, left_out

    def _findings(self, pool: Manifest) -> Tensor | None:
        """Extract findings (N, F) from the pool's reports, distributed over the ranks (collective).

        Returns:
            The findings, or None if any report is missing: the re-rank counts a finding that is not mentioned as
            absent, which does not hold for an X-ray without a report.
        """
        if not pool.has_report().all():
            return None
        return torch.from_numpy(extract_shared(pool.reports(), self.vocabulary_name))

    def _write(
        self,
        folder: Path,
        table: dict[str, Tensor],
        pool: Manifest,
        datamodule: XrayDataModule,
        left_out: dict[str, int],
        findings: Tensor | None,
    ) -> XrayIndexArtefact:
        """Write keys, index, and the findings extracted from the pool's reports, as an artefact."""
        texts = [pool.report(row) for row in pool.frame.index]
        keys = table.pop("keys")
        if self.key != "image":
            share_keys(keys, texts)
        query_centre = self._query_centre(datamodule.ct)
        described = {name: value for name, value in self.expert.describe().items() if name != "source"}
        config = {"expert": described, "key": self.key, "vocabulary": self.vocabulary.name, "left_out": left_out,
                  "query_centre": query_centre, **self._describe_separate()}  # fmt: skip
        return write_index_artefact(
            folder,
            make_keys(self.key, keys, table["values"], centred=query_centre is not None),
            table["values"],
            pool.frame.assign(row=pool.frame.index),
            {"xray-expert": self.expert.fingerprint(), "xray-manifest": datamodule.manifest.fingerprint},
            config,
            texts=texts,
            findings=findings,
            finding_names=None if findings is None else self.vocabulary.names,
            kind=self.index_kind,
            minimum_recall=self.minimum_recall if self.index_kind != "exact" else None,
            search_width=self.search_width,
            report_source=self.report_source,
        )

    def _query_centre(self, ct: Manifest | None) -> list[float] | None:
        """Return the mean embedding of the CT `train` reports, (D_t,), or None without centring."""
        if not self.centre or ct is None:
            return None
        train = ct.split("train")
        texts = [text for text in (train.report(row) for row in train.frame.index) if text]
        if not texts:
            return None
        mean: list[float] = self.reports.encode_text(texts).mean(dim=0).tolist()
        return mean

    def _quality(self, store: XrayIndexArtefact, pool: Manifest, held_out: Manifest) -> dict[str, Any]:
        """Measure the retrieval; see `measure_retrieval`."""
        if not len(held_out):
            return {"queries": 0}
        queries = self.reports.encode_text([held_out.report(row) for row in held_out.frame.index]).cpu()
        reader = FindingsReader(store, self.vocabulary_name) if store.finding_names else None
        return measure_retrieval(store, queries, held_out, pool, self.neighbours, self.vocabulary, reader)
