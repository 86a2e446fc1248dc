"""The feature store of stage 1: keys v_j, values u_j and who they belong to, in one order, as an artefact.

An index artefact folder holds `artefact.json`, `model.safetensors` (`keys` (N, D_k), `values` (N, D_v) and, where
given, `findings` (N, F)), `items.csv` and `index.faiss`. Keys and values live in `model.safetensors`, not in .npy
files, because safetensors memory-maps a tensor as well as NumPy does (ranks of one host share the pages) and the
artefact's fingerprint then covers them. `items.csv` is covered by its hash in the config; `index.faiss` is derived
from the keys and checked for size.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctx_distill.checkpoint import WEIGHTS_FILE, hash_file, hash_json, read_artefact, write_artefact
from ctx_distill.retrieval.index import INDEX_FILE, Device, IndexKind, XrayIndex, build_index
from ctx_distill.types import InputError

ITEMS_FILE = "items.csv"
ITEM_COLUMNS = ("position", "study_id", "image_id", "patient_id", "row", "split")
EXPERT = "xray-expert"
AGAIN = "Run stage 1 (make stage-1) to build it again."


def write_index_artefact(
    folder: Path,
    keys: Tensor,
    values: Tensor,
    items: pd.DataFrame,
    upstream: Mapping[str, str],
    config: Mapping[str, Any],
    texts: Sequence[str] | None = None,
    findings: Tensor | None = None,
    finding_names: Sequence[str] | None = None,
    kind: IndexKind = "exact",
    minimum_recall: float | None = None,
    value_type: Literal["float32", "float16"] = "float32",
) -> XrayIndexArtefact:
    """Build the index and write the artefact, whole or not at all.

    Args:
        folder: the artefact's folder.
        keys: (N, D_k) unit rows.
        values: (N, D_v) unit rows: the teacher's features.
        items: N rows in the same order, with study_id, image_id, patient_id, row (of the manifest) and split.
        upstream: fingerprints by name; `xray-expert` must be among them.
        config: plain JSON values to keep (what the keys were made from, what was left out).
        texts: N report texts, kept as the column `report`.
        findings: (N, F) read from the texts (1, 0, -1 uncertain, NaN), for the findings re-rank.
        finding_names: their F names.
        kind: of the index.
        minimum_recall: refuse an approximate index below it.
        value_type: how values are stored.

    Raises:
        InputError: see `build_index`.
        ValueError: the parts do not fit together.
    """
    rows = len(keys)
    lengths = {"values": len(values), "items": len(items)}
    lengths |= {} if texts is None else {"texts": len(texts)}
    lengths |= {} if findings is None else {"findings": len(findings)}
    if wrong := {name: length for name, length in lengths.items() if length != rows}:
        raise ValueError(f"index artefact got {rows} keys but {wrong}; expected the same number of each")
    if missing := [name for name in ITEM_COLUMNS[1:] if name not in items.columns]:
        raise ValueError(f"index artefact's items lack {', '.join(missing)}")
    if EXPERT not in upstream:
        raise ValueError(f"index artefact needs the {EXPERT} fingerprint in upstream; got {sorted(upstream)}")
    table = items.reset_index(drop=True).assign(position=range(rows))[list(ITEM_COLUMNS)]
    if texts is not None:
        table["report"] = list(texts)
    if not bool(torch.isfinite(values.sum(dim=1)).all()):
        bad = int((~torch.isfinite(values.sum(dim=1))).nonzero()[0])
        raise InputError(f"value {bad} of the X-ray index is not finite. Check the expert's weights and that image.")
    content = table.to_csv(index=False, quoting=csv.QUOTE_MINIMAL, lineterminator="\n")
    keys = keys.detach().cpu().float()
    index = build_index(keys, kind, device="cpu", minimum_recall=minimum_recall)
    tensors = {"keys": keys, "values": values.detach().cpu().to(getattr(torch, value_type))}
    if findings is not None:
        tensors["findings"] = findings.detach().cpu().float()
    record = {
        **config,
        "items": rows,
        "key_dim": keys.shape[1],
        "value_dim": values.shape[1],
        "index_kind": kind,
        "index_recall": index.recall,
        "finding_names": list(finding_names) if finding_names is not None else None,
        "items_hash": hash_json(content),
        # The fingerprint covers the config: an index of another expert or manifest is another index.
        "made_from": dict(upstream),
    }

    def add_files(temporary: Path) -> None:
        (temporary / ITEMS_FILE).write_text(content, encoding="utf-8", newline="")
        index.save(temporary / INDEX_FILE)

    write_artefact(folder, "xray-index", record, tensors, upstream, extra=add_files)
    return XrayIndexArtefact.open(folder, device="cpu")


def _map_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped: pages are read when touched. Do not write into them."""
    with safe_open(path, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping


@dataclass(frozen=True)
class XrayIndexArtefact:
    """An index artefact, open for lookups.

    Attributes:
        folder: where it lies.
        fingerprint: of keys, values, items, expert and manifest.
        expert_fingerprint: of the X-ray expert that embedded the pool.
        upstream: all upstream fingerprints.
        config: what `write_index_artefact` got, with key_dim, value_dim, items, index_kind, index_recall.
        items: N rows: position, study_id, image_id, patient_id, row, split, and report where kept.
        index: over the keys.
        features: (N, D_v) the values, memory-mapped.
        findings: (N, F) or None.
    """

    folder: Path
    fingerprint: str
    expert_fingerprint: str
    upstream: dict[str, str]
    config: dict[str, Any]
    items: pd.DataFrame
    index: XrayIndex
    features: Tensor
    findings: Tensor | None

    @classmethod
    def open(cls, folder: Path, device: Device = "auto", verify: bool = False) -> XrayIndexArtefact:
        """Open an artefact; keys and values stay on disk until touched.

        Args:
            folder: where it lies.
            device: of the index.
            verify: read all of keys and values once and compare with the fingerprint.

        Raises:
            InputError: a part is missing, damaged, or does not fit the others.
        """
        artefact = read_artefact(folder, "xray-index")
        weights, items_path = folder / WEIGHTS_FILE, folder / ITEMS_FILE
        for path in (weights, items_path, folder / INDEX_FILE):
            if not path.is_file():
                raise InputError(f"{path}: missing from the X-ray index. {AGAIN}")
        try:
            tensors = _map_tensors(weights)
            features, keys = tensors["values"], tensors["keys"]
        except (SafetensorError, KeyError, OSError) as error:
            raise InputError(f"{weights}: not the features of an X-ray index ({error}). {AGAIN}") from error
        if verify:
            content = {"kind": artefact.kind, "config": artefact.config, "weights": hash_file(weights)}
            if hash_json(content) != artefact.fingerprint:
                raise InputError(f"{weights}: does not agree with the artefact's fingerprint. {AGAIN}")
        table = items_path.read_bytes().decode(errors="replace")
        if hash_json(table) != artefact.config.get("items_hash"):
            raise InputError(f"{items_path}: changed since the index was built. {AGAIN}")
        items = pd.read_csv(
            items_path,
            dtype={"study_id": str, "image_id": str, "patient_id": str, "split": str, "report": str},
            keep_default_na=False,
        )
        index = XrayIndex.load(folder / INDEX_FILE, device)
        found = {
            "artefact.json": (artefact.config.get("items"), artefact.config.get("key_dim")),
            WEIGHTS_FILE: (len(keys), keys.shape[1]),
            INDEX_FILE: (len(index), index.dimension),
        }
        if len(set(found.values())) > 1 or len(features) != len(index) or len(items) != len(index):
            sizes = ", ".join(f"{name} {rows} x {dimension}" for name, (rows, dimension) in found.items())
            raise InputError(
                f"{folder}: the index's parts do not fit together ({sizes}, {len(features)} values, "
                f"{len(items)} items). {AGAIN}"
            )
        if EXPERT not in artefact.upstream:
            raise InputError(f"{folder}: the X-ray index does not name its {EXPERT}. {AGAIN}")
        return cls(
            folder=folder,
            fingerprint=artefact.fingerprint,
            expert_fingerprint=artefact.upstream[EXPERT],
            upstream=artefact.upstream,
            config=artefact.config,
            items=items,
            index=index,
            features=features,
            findings=tensors.get("findings"),
        )

    def __len__(self) -> int:
        return len(self.index)

    @property
    def key_dim(self) -> int:
        """D_k: what queries are made of."""
        return self.index.dimension

    @property
    def value_dim(self) -> int:
        """D_v: what the student is distilled towards."""
        return int(self.features.shape[1])

    @cached_property
    def query_centre(self) -> Tensor | None:
        """(D_k,): the mean query, taken off before a search where the index was built with centring."""
        centre = self.config.get("query_centre")
        return None if centre is None else torch.tensor(centre)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `XrayIndex.search`; queries are centred first where the keys were."""
        centre = self.query_centre
        if centre is not None:
            queries = F.normalize(queries - centre.to(queries), dim=-1)
        return self.index.search(queries, k)

    def values(self, positions: Tensor) -> Tensor:
        """Features of items.

        Args:
            positions: (...,) int64.

        Returns:
            (..., D_v) float32 on the positions' device.
        """
        rows = self.features[positions.reshape(-1).cpu()].float()
        return rows.reshape(*positions.shape, self.value_dim).to(positions.device)


def write_shard(folder: Path, rank: int, world_size: int, keys: Tensor, values: Tensor, rows: Tensor) -> Path:
    """Write one rank's part of the pool's embeddings; give a fresh folder a predict job.

    Args:
        folder: of the shards.
        rank: this rank.
        world_size: number of ranks, so that a missing shard is noticed.
        keys: (n, D_k).
        values: (n, D_v).
        rows: (n,) int64, the manifest row of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"shard-{rank:05d}.safetensors"
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    tensors = {"keys": keys.float(), "values": values.float(), "row": rows.to(torch.int64)}
    save_file(
        {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
        part,
        metadata={"rank": str(rank), "world_size": str(world_size)},
    )
    part.replace(path)
    return path


def merge_shards(folder: Path, rows: Sequence[int] | Tensor) -> dict[str, Tensor]:
    """Join the shards of all ranks into one table.

    Args:
        folder: of the shards.
        rows: (N,) the manifest rows that must be there, in the order wanted.

    Returns:
        `keys` (N, D_k), `values` (N, D_v) and `row` (N,), in that order.

    Raises:
        InputError: a shard is missing, left over or unreadable, or a row is missing, doubled or not expected.
    """
    paths = sorted(folder.glob("shard-*.safetensors"))
    again = "Delete the folder and run the predict job again."
    parts, ranks, sizes = [], [], set()
    for path in paths:
        try:
            with safe_open(path, framework="pt") as handle:
                metadata = handle.metadata() or {}
                ranks.append(int(metadata["rank"]))
                sizes.add(int(metadata["world_size"]))
            tensors = _map_tensors(path)
            parts.append((tensors["keys"], tensors["values"], tensors["row"]))
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise InputError(f"{path}: not a readable shard ({error}). {again}") from error
    if len(sizes) != 1 or sorted(ranks) != list(range(next(iter(sizes)))):
        raise InputError(
            f"{folder}: holds shards of ranks {sorted(ranks)} of runs with {sorted(sizes)} ranks; "
            f"expected every rank of one run. {again}"
        )
    wanted = torch.as_tensor(rows, dtype=torch.int64)
    row = torch.cat([part[2] for part in parts])
    found, counts = row.unique(return_counts=True)  # type: ignore[no-untyped-call]
    problems = {
        "doubled": found[counts > 1],
        "missing": wanted[~torch.isin(wanted, found)],
        "not expected": found[~torch.isin(found, wanted)],
    }
    told = [f"{len(bad)} {what} (first: row {int(bad[0])})" for what, bad in problems.items() if len(bad)]
    if told or len(set(wanted.tolist())) != len(wanted):
        told = told or ["rows asked for twice"]
        raise InputError(f"{folder}: shards do not hold every row exactly once: {', '.join(told)}. {again}")
    order = row.argsort()[torch.searchsorted(found, wanted)]
    return {
        "keys": torch.cat([part[0] for part in parts])[order],
        "values": torch.cat([part[1] for part in parts])[order],
        "row": row[order],
    }
