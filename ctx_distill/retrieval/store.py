"""The feature store of stage 1: keys v_j, values u_j and their items, in one order, as an artefact.

An index artefact contains:

- `artefact.json`;
- `model.safetensors`: `keys` (N, D_k), `values` (N, D_v) and optionally `findings` (N, F), memory-mapped and covered by
  the artefact's fingerprint;
- `items.csv`, covered by its hash in the config;
- `index.faiss` and, if keys repeat, `equal_keys.safetensors`, both derived from the keys; an exact index then stores each
  distinct key once. Their sizes are checked;
- `report_encoder.json`, if the reports were embedded by a separate encoder. The encoder's path is not part of the
  fingerprint, but the encoder's own fingerprint is.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ctx_distill.checkpoint import WEIGHTS_FILE, hash_file, hash_json, read_artefact, write_artefact, write_json
from ctx_distill.retrieval.build_index import build_index
from ctx_distill.retrieval.equal import first_near
from ctx_distill.retrieval.index import INDEX_FILE, Device, IndexKind, KeyIndex, Placement, XrayIndex
from ctx_distill.retrieval.keys import KeyKind, make_queries
from ctx_distill.retrieval.sharded import ShardedIndex
from ctx_distill.types import InputError

ITEMS_FILE = "items.csv"
ITEM_COLUMNS = ("position", "study_id", "image_id", "patient_id", "row", "split")
EXPERT = "xray-expert"
REPORT_ENCODER = "report-encoder"
REPORT_ENCODER_FILE = "report_encoder.json"
AGAIN = "Run stage 1 (`ctx-distill index`) to rebuild it."
SAME_KEY = 1e-6
"""Euclidean distance below which keys are stored as one: rounding differences of an embedding between batches."""


@dataclass(frozen=True)
class ReportSource:
    """The separate encoder of the reports.

    Attributes:
        source: Folder or `hf-hub:organisation/name`.
        revision: Commit of a hub source.
        fingerprint: Fingerprint of the encoder.
    """

    source: str
    revision: str | None
    fingerprint: str


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
    search_width: int | None = None,
    value_type: Literal["float32", "float16"] = "float32",
    report_source: ReportSource | None = None,
) -> XrayIndexArtefact:
    """Build the index and write the artefact atomically.

    Args:
        folder: The artefact's folder.
        keys: (N, D_k) unit rows; of keys within `SAME_KEY` of each other, the first is stored for all.
        values: (N, D_v) unit rows, the teacher's features.
        items: N rows in the same order, with study_id, image_id, patient_id, row (of the manifest) and split.
        upstream: Fingerprints by name; must include `xray-expert`.
        config: JSON values to store (`key`, the kind of the keys; `query_centre`; counts of excluded X-rays).
        texts: N reports, stored as the column `report`.
        findings: (N, F) findings of the reports (1, 0, -1 uncertain, NaN), for the findings re-rank.
        finding_names: Their F names.
        kind: Kind of the index.
        minimum_recall: Minimum recall@1 of an approximate index.
        search_width: Search width of an approximate index; see `build_index`.
        value_type: Type of the stored values.
        report_source: The encoder of the reports; None if it is the expert.

    Returns:
        The opened artefact.

    Raises:
        InputError: a value is not finite, or see `build_index`.
        ValueError: Lengths or columns do not match.
    """
    rows = len(keys)
    lengths = {"values": len(values), "items": len(items)}
    lengths |= {} if texts is None else {"texts": len(texts)}
    lengths |= {} if findings is None else {"findings": len(findings)}
    if wrong := {name: length for name, length in lengths.items() if length != rows}:
        raise ValueError(f"index artefact got {rows} keys but {wrong}; expected equal lengths")
    if missing := [name for name in ITEM_COLUMNS[1:] if name not in items.columns]:
        raise ValueError(f"index artefact's items lack {', '.join(missing)}; expected {', '.join(ITEM_COLUMNS[1:])}")
    if EXPERT not in upstream:
        raise ValueError(f"index artefact needs the {EXPERT} fingerprint in upstream; got {sorted(upstream)}")
    if report_source is not None:
        upstream = {**upstream, REPORT_ENCODER: report_source.fingerprint}
    table = items.reset_index(drop=True).assign(position=range(rows))[list(ITEM_COLUMNS)]
    if texts is not None:
        table["report"] = list(texts)
    if not bool(torch.isfinite(values.sum(dim=1)).all()):
        bad = int((~torch.isfinite(values.sum(dim=1))).nonzero()[0])
        raise InputError(f"value {bad} of the X-ray index is not finite. Check the expert's weights and the image.")
    content = table.to_csv(index=False, quoting=csv.QUOTE_MINIMAL, lineterminator="\n")
    keys = keys.detach().cpu().float()
    first = torch.from_numpy(first_near(keys, SAME_KEY))
    if bool((first != torch.arange(rows)).any()):
        keys = keys[first]
    index = build_index(keys, kind, device="cpu", search_width=search_width, minimum_recall=minimum_recall)
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
        # Part of the config, so that the fingerprint depends on the expert and the manifest.
        "made_from": dict(upstream),
    }

    def add_files(temporary: Path) -> None:
        (temporary / ITEMS_FILE).write_text(content, encoding="utf-8", newline="")
        index.save(temporary / INDEX_FILE)
        if report_source is not None:
            place = {"source": report_source.source, "revision": report_source.revision}
            write_json(temporary / REPORT_ENCODER_FILE, place)

    write_artefact(folder, "xray-index", record, tensors, upstream, extra=add_files)
    return XrayIndexArtefact.open(folder, device="cpu")


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, memory-mapped. Do not write to them."""
    with safe_open(path, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping


@dataclass(frozen=True)
class XrayIndexArtefact:
    """An opened index artefact.

    Attributes:
        folder: Folder of the artefact.
        fingerprint: Covers keys, values, items, expert and manifest.
        expert_fingerprint: Fingerprint of the X-ray expert that embedded the pool.
        upstream: All upstream fingerprints.
        config: The `config` of `write_index_artefact`, with key_dim, value_dim, items, index_kind and index_recall.
        items: N rows: position, study_id, image_id, patient_id, row, split, and optionally report.
        keys: (N, D_k), memory-mapped.
        features: (N, D_v), the values, memory-mapped.
        findings: (N, F) or None.
        device: See `open`.
        placement: See `open`.
        report_source: The encoder of the reports; None if it is the expert.
    """

    folder: Path
    fingerprint: str
    expert_fingerprint: str
    upstream: dict[str, str]
    config: dict[str, Any]
    items: pd.DataFrame
    keys: Tensor
    features: Tensor
    findings: Tensor | None
    device: Device = "auto"
    placement: Placement = "replicated"
    report_source: ReportSource | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        device: Device = "auto",
        verify: bool = False,
        placement: Placement = "replicated",
        searched: bool = True,
    ) -> XrayIndexArtefact:
        """Open an artefact; keys and values are memory-mapped.

        Args:
            folder: Folder of the artefact.
            device: Device of the index after `place` or the first search.
            placement: `replicated`: this process searches the complete index, of any kind; `sharded`: each rank searches
                its shard of the keys exactly (see `ShardedIndex`).
            verify: Read all keys and values and compare them with the fingerprint.
            searched: Open the index now, on the CPU; otherwise it is opened on first use.

        Raises:
            InputError: a part is missing or corrupt, or does not match the others.
        """
        artefact = read_artefact(folder, "xray-index")
        weights, items_path = folder / WEIGHTS_FILE, folder / ITEMS_FILE
        for path in (weights, items_path, folder / INDEX_FILE):
            if not path.is_file():
                raise InputError(f"{path}: missing from the X-ray index. {AGAIN}")
        try:
            tensors = map_tensors(weights)
            features, keys = tensors["values"], tensors["keys"]
        except (SafetensorError, KeyError, OSError) as error:
            raise InputError(f"{weights}: not a readable feature file of an X-ray index ({error}). {AGAIN}") from error
        if verify:
            content = {"kind": artefact.kind, "config": artefact.config, "weights": hash_file(weights)}
            if hash_json(content) != artefact.fingerprint:
                raise InputError(f"{weights}: does not match the artefact's fingerprint. {AGAIN}")
        table = items_path.read_bytes().decode(errors="replace")
        if hash_json(table) != artefact.config.get("items_hash"):
            raise InputError(f"{items_path}: changed since the index was built. {AGAIN}")
        items = pd.read_csv(
            items_path,
            dtype={"study_id": str, "image_id": str, "patient_id": str, "split": str, "report": str},
            keep_default_na=False,
        )
        parts = {
            "artefact.json": (artefact.config.get("items"), artefact.config.get("key_dim")),
            WEIGHTS_FILE: (len(keys), keys.shape[1]),
        }
        if len(set(parts.values())) > 1 or not len(features) == len(items) == len(keys):
            raise InputError(_misfit(folder, parts, len(features), len(items)))
        if EXPERT not in artefact.upstream:
            raise InputError(f"{folder}: the X-ray index has no {EXPERT} fingerprint. {AGAIN}")
        store = cls(
            folder=folder,
            fingerprint=artefact.fingerprint,
            expert_fingerprint=artefact.upstream[EXPERT],
            upstream=artefact.upstream,
            config=artefact.config,
            items=items,
            keys=keys,
            features=features,
            findings=tensors.get("findings"),
            device=device,
            placement=placement,
            report_source=_read_report_source(folder, artefact.upstream.get(REPORT_ENCODER)),
        )
        if searched:
            store.index  # noqa: B018 - opens and checks the index
        return store

    @cached_property
    def index(self) -> KeyIndex:
        """The index over the keys, opened on the CPU on first use; see `place`.

        Raises:
            InputError: The index is corrupt, or does not match the other parts.
        """
        device: Device = "cpu" if self.placement == "sharded" else self.device
        index = XrayIndex.load(self.folder / INDEX_FILE, device)
        parts = {WEIGHTS_FILE: tuple(self.keys.shape), INDEX_FILE: (len(index), index.dimension)}
        if len(set(parts.values())) > 1:
            named = {"artefact.json": (self.config.get("items"), self.config.get("key_dim")), **parts}
            raise InputError(_misfit(self.folder, named, len(self.features), len(self.items)))
        if self.placement == "replicated":
            return index
        return ShardedIndex(self.keys, self.device) if index.equal is None else ShardedIndex.of(index, self.device)

    def place(self, device: torch.device) -> None:
        """Move the index to the rank's device, if the `device` of `open` allows it; to be called in a task's `setup`."""
        self.index.place(device)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def key(self) -> KeyKind:
        """Kind of the keys."""
        kind: KeyKind = self.config.get("key", "text")
        return kind

    @property
    def key_dim(self) -> int:
        """D_k, the dimension of the keys."""
        return int(self.keys.shape[1])

    @property
    def query_dim(self) -> int:
        """D_t, the dimension of the report embeddings that `search` expects."""
        return self.key_dim // 2 if self.key == "both" else self.key_dim

    @property
    def finding_names(self) -> list[str]:
        """Names of the F columns of `findings`; empty without findings."""
        return list(self.config.get("finding_names") or [])

    @property
    def value_dim(self) -> int:
        """D_v, the dimension of the values."""
        return int(self.features.shape[1])

    @cached_property
    def query_centre(self) -> Tensor | None:
        """Mean query (D_t,), which is subtracted before a search; None without centring."""
        centre = self.config.get("query_centre")
        return None if centre is None else torch.tensor(centre)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k nearest X-rays of each report; queries are centred and converted to the kind of the keys here.

        Args:
            queries: (B, D_t) unit rows, the reports embedded by the index's report encoder.
            k: Neighbours.

        Returns:
            See `XrayIndex.search`.

        Raises:
            InputError: The dimension differs, or k is larger than the index.
        """
        if queries.shape[1] != self.query_dim:
            raise InputError(
                f"queries have {queries.shape[1]} dimensions; the X-ray index {self.folder} expects {self.query_dim}. "
                "Embed the reports with the encoder that the index was built with, or rebuild the index."
            )
        return self.index.search(make_queries(self.key, queries, self.query_centre), k)

    def values(self, positions: Tensor) -> Tensor:
        """Return the features of items.

        Args:
            positions: (...,) int64.

        Returns:
            (..., D_v) float32 on the positions' device.
        """
        rows = self.features[positions.reshape(-1).cpu()].float()
        return rows.reshape(*positions.shape, self.value_dim).to(positions.device)


def _misfit(folder: Path, parts: Mapping[str, tuple[Any, ...]], values: int, items: int) -> str:
    sizes = ", ".join(f"{name} {rows} x {dimension}" for name, (rows, dimension) in parts.items())
    return f"{folder}: the parts of the index do not match ({sizes}, {values} values, {items} items). {AGAIN}"


def _read_report_source(folder: Path, fingerprint: str | None) -> ReportSource | None:
    if fingerprint is None:
        return None
    path = folder / REPORT_ENCODER_FILE
    try:
        place = json.loads(path.read_text(encoding="utf-8"))
        return ReportSource(place["source"], place["revision"], fingerprint)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no readable source of the index's report encoder ({error}). {AGAIN}") from error
