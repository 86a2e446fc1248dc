"""Stage 1: embed the X-ray pool with the frozen expert, build the FAISS index, and measure the retrieval."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ctx_distill.data.datamodules import XrayDataModule
from ctx_distill.data.manifest import Manifest
from ctx_distill.distributed import barrier, rank, world_size
from ctx_distill.errors import InputError
from ctx_distill.files import write_text
from ctx_distill.metrics.retrieval import retrieval_quality
from ctx_distill.models.xray_expert import XrayExpert, open_expert
from ctx_distill.retrieval.index import IndexKind
from ctx_distill.retrieval.store import XrayIndexArtefact, merge_shards, write_index_artefact, write_shard
from ctx_distill.tasks.base import StageTask
from ctx_distill.types import XrayBatch


class IndexTask(StageTask):
    """Retrieval-index build: a predict job over the pool, then the index (method, stage 1).

    Args:
        expert: folder or hub name of the X-ray expert.
        expert_revision: pinned commit of a hub expert.
        index_kind: exact search, or an approximate index for large pools.
        minimum_recall: an approximate index whose recall@1 against exact search is lower is refused.
        centre: take the pool's mean off the keys, and the mean of the CT `train` reports off the queries, so that what
            all X-ray reports and what all CT reports share in style does not count (**ours**, after Mu and
            Viswanath 2018, "All-but-the-Top").
        neighbours: how many X-rays a study `retrieval.csv` lists.
    """

    def __init__(
        self,
        expert: str,
        expert_revision: str | None = None,
        index_kind: IndexKind = "exact",
        minimum_recall: float = 0.95,
        centre: bool = True,
        neighbours: int = 10,
    ) -> None:
        super().__init__()
        self.expert: XrayExpert = open_expert(expert, expert_revision)
        if not self.expert.has_text:
            raise InputError(
                f"{expert}: this expert has no text tower, so that reports cannot be keys. Give one with text "
                "(open_clip, SigLIP) with EXPERT= or ARGS=--model.init_args.expert=<folder>."
            )
        self.index_kind, self.minimum_recall, self.neighbours = index_kind, minimum_recall, neighbours
        self.centre = centre

    def describe(self) -> dict[str, Any]:
        """The expert."""
        return {"expert": self.expert.describe()}

    def predict_step(self, batch: XrayBatch, batch_idx: int) -> dict[str, Tensor]:
        """Values u_j (B, D_e) and keys v_j (B, D_t) of a batch."""
        del batch_idx
        return {
            "values": self.expert.encode_image(batch.image),
            "keys": self.expert.encode_text(batch.report),
            "row": batch.row,
        }

    def run(self, trainer: L.Trainer, datamodule: L.LightningDataModule, folder: Path) -> dict[str, Any]:
        """Embed, join the ranks' shards, build, look up the held-out CT studies."""
        assert isinstance(datamodule, XrayDataModule)
        pool, left_out = datamodule.pool()
        texts = [pool.report(row) for row in pool.frame.index]
        silent = sum(not text for text in texts)
        if silent:
            pool = pool.where(np.array([bool(text) for text in texts]))
            texts = [text for text in texts if text]
            left_out = {**left_out, "no report text": silent}
        for reason, count in left_out.items():
            if count:
                print(f"left out of the index: {count} X-rays ({reason})")
        if not len(pool):
            raise InputError(f"{datamodule.manifest.path}: no X-ray is left for the index; left out: {left_out}.")
        datamodule.preprocess, datamodule.preprocess_key = self.expert.preprocess, self.expert.fingerprint()
        outputs: list[Any] = trainer.predict(self, dataloaders=datamodule.loader(pool)) or []
        shards = folder / "shards"
        if rank() == 0:
            shutil.rmtree(shards, ignore_errors=True)
        barrier()
        joined = {name: torch.cat([output[name] for output in outputs]).cpu() for name in ("keys", "values", "row")}
        write_shard(shards, rank(), world_size(), joined["keys"], joined["values"], joined["row"])
        barrier()
        metrics: dict[str, Any] = {}
        if rank() == 0:
            table = merge_shards(shards, [int(row) for row in pool.frame.index])
            expert = {name: value for name, value in self.expert.describe().items() if name != "source"}
            query_centre = self._query_centre(datamodule.ct)
            keys = table["keys"]
            if query_centre is not None:
                keys = F.normalize(keys - keys.mean(dim=0), dim=-1)
            store = write_index_artefact(
                folder / "artefact",
                keys,
                table["values"],
                pool.frame.assign(row=pool.frame.index),
                {"xray-expert": self.expert.fingerprint(), "xray-manifest": datamodule.manifest.fingerprint},
                {"expert": expert, "left_out": left_out, "query_centre": query_centre},
                texts=texts,
                kind=self.index_kind,
                minimum_recall=self.minimum_recall if self.index_kind != "exact" else None,
            )
            shutil.rmtree(shards)
            metrics = {"pool": len(pool), "left_out": left_out, "key_dim": store.key_dim, "value_dim": store.value_dim}
            if datamodule.ct is not None:
                metrics |= self._quality(store, pool, datamodule.ct, folder)
        barrier()
        return metrics

    def _query_centre(self, ct: Manifest | None) -> list[float] | None:
        """Mean embedding of the CT `train` reports, (D_t,); None where nothing is to be centred."""
        if not self.centre or ct is None:
            return None
        train = ct.split("train")
        texts = [text for text in (train.report(row) for row in train.frame.index) if text]
        if not texts:
            return None
        mean: list[float] = self.expert.encode_text(texts).mean(dim=0).tolist()
        return mean

    def _quality(self, store: XrayIndexArtefact, pool: Manifest, ct: Manifest, folder: Path) -> dict[str, Any]:
        """Look up each held-out CT study's report; write `retrieval.csv`; compare findings where both have labels."""
        held_out = ct.split("val", "test")
        held_out = held_out.where(~held_out.frame["study_id"].duplicated().to_numpy())
        texts = [held_out.report(row) for row in held_out.frame.index]
        held_out = held_out.where(np.array([bool(text) for text in texts], dtype=bool))
        if not len(held_out):
            return {"queries": 0}
        with torch.no_grad():
            queries = self.expert.encode_text([text for text in texts if text]).cpu()
        k = min(self.neighbours, len(pool))
        similarity, positions = store.search(queries, k)
        write_neighbours(folder / "retrieval.csv", held_out, pool, similarity.numpy(), positions.numpy())
        names = [name for name in ct.finding_names if name in pool.finding_names]
        metrics: dict[str, Any] = {"queries": len(held_out), "findings_compared": names}
        if names:
            metrics |= retrieval_quality(
                label_columns(held_out, names),
                label_columns(pool, names),
                positions.numpy(),
                patients=held_out.frame["patient_id"].tolist(),
            )
        return metrics


def label_columns(manifest: Manifest, names: list[str]) -> NDArray[np.float32]:
    """(N, F) labels of the findings named, 1, 0, -1 or NaN."""
    return manifest.frame[[f"label:{name}" for name in names]].to_numpy(np.float32)


def write_neighbours(
    path: Path, queries: Manifest, pool: Manifest, similarity: NDArray[np.float32], positions: NDArray[np.int64]
) -> None:
    """Write the nearest X-rays of each CT study (contract: `retrieval.csv`)."""
    count, k = positions.shape
    nearest = pool.frame.iloc[positions.reshape(-1)]
    table = pd.DataFrame(
        {
            "study_id": np.repeat(queries.frame["study_id"].to_numpy(), k),
            "split": np.repeat(queries.frame["split"].to_numpy(), k),
            "rank": np.tile(np.arange(1, k + 1), count),
            "xray_study_id": nearest["study_id"].to_numpy(),
            "xray_image_id": nearest["image_id"].to_numpy(),
            "similarity": similarity.reshape(-1),
        }
    )
    write_text(path, table.to_csv(index=False, float_format="%.5f", lineterminator="\n"))
