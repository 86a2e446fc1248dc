"""Record which pairs stage 3 suspected as false negatives, in bounded memory, identically on every rank.

A batch of 2,048 studies can have 2 million suspected pairs, of which 300 are kept. To avoid copying all of them to the
host, the pairs of a batch are first compared, on the device, with the last entry of each table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctx_distill.files import write_text
from ctx_distill.losses.false_negatives import TOLERANCE, Correction
from ctx_distill.losses.pair_order import HASH_BITS, STEPS

KEPT = {"strongest": 200, "contradicted": 50, "borderline": 50}
"""Number of pairs kept: the strongest, the strongest that labels contradict, and those nearest to the threshold."""
DECIMALS = 6
"""Decimals of the evidence in the written table."""
_ROUNDED = TOLERANCE + 0.5 * 10**-DECIMALS
"""How far below its threshold rounded evidence that passed may be."""
_HASH = (1 << HASH_BITS) - 1
_COUNTS = ("suspected_batches", "corrected_batches", "suspected_epochs", "corrected_epochs", "first_epoch", "last_epoch",
           "last_corrected_epoch", "labels_known", "labels_differ")  # fmt: skip
Table = dict[str, NDArray[Any]]


class CorrectedPairs:
    """A bounded record of suspected pairs of studies, with how often and when they were suspected.

    Pairs are unordered and count once per batch. They are ranked by strength, then by a hash of the pair
    (`losses.pair_order`). This total order is stable while a pair's evidence is: a pair that is kept has been kept since
    it was first seen, so its counts are complete. Evidence `ema` changes during training; a pair that enters a table
    late because of it is counted from then on.

    Attributes:
        kinds: Evidence in use.
        tables: By the reason for keeping a pair: `key` (the two study codes), `order` (of the pair when it was
            strongest), counts, and a value per kind of evidence.
        totals: Unordered pairs of images suspected and corrected so far, over all batches.
    """

    def __init__(self, kinds: Sequence[str], kept: Mapping[str, int] = KEPT) -> None:
        """Create empty tables.

        Args:
            kinds: Evidence in use (`EvidenceKind`).
            kept: Number of pairs to keep per table.
        """
        self.kinds, self.kept = tuple(kinds), dict(kept)
        self.tables = {why: self._nothing() for why in self.kept}
        self.totals = {"suspected": 0, "corrected": 0}

    def _nothing(self, rows: int = 0) -> Table:
        """Return a table of `rows` pairs with zero counts."""
        table: Table = {name: np.zeros(rows, dtype=np.int64) for name in ("key", "order", *_COUNTS)}
        for name in ("order", "last_epoch", "last_corrected_epoch"):
            table[name] -= 1
        return table | {kind: np.zeros(rows, dtype=np.float64) for kind in self.kinds}

    @torch.no_grad()
    def observe(
        self,
        correction: Correction,
        evidence: Mapping[str, Tensor],
        study: Tensor,
        labels: Tensor | None,
        contradicted: Tensor | None,
        epoch: int,
    ) -> None:
        """Record the pairs of a global batch.

        Args:
            correction: The correction of the batch.
            evidence: (B, B) by kind.
            study: (B,) int64, gathered.
            labels: (B, F) gathered, 1, 0, -1 or NaN; None without labels.
            contradicted: (B, B) bool, the pairs whose labels differ (`contradictions`); None without labels.
            epoch: Current epoch.
        """
        order, twice = correction.order, torch.stack([correction.suspected, correction.corrected])
        if "ema" in self.kinds:  # the only evidence that is not symmetric
            order = torch.maximum(order, order.T)
            twice = torch.stack([(pairs | pairs.T).count_nonzero() for pairs in (correction.pairs, correction.chosen)])
        for name, count in zip(self.totals, (twice // 2).tolist(), strict=True):
            self.totals[name] += count
        i, j = self._select(order, contradicted)
        if not len(i):
            return
        known, differ = _label_agreement(labels, i, j)
        low, high = torch.minimum(study[i], study[j]), torch.maximum(study[i], study[j])
        chosen = correction.chosen[i, j] | correction.chosen[j, i]
        columns = torch.stack([(low << 32) | high, order[i, j], chosen.long(), known, differ]).cpu().numpy()
        seen: Table = dict(zip(("key", "order", "corrected", "labels_known", "labels_differ"), columns, strict=True))
        for kind in self.kinds:
            matrix = evidence[kind]
            values = torch.maximum(matrix[i, j], matrix[j, i]).double()
            seen[kind] = values.cpu().numpy().round(DECIMALS)
        seen = _once(seen, self.kinds)
        for why in self.tables:
            eligible = seen["labels_differ"] > 0 if why == "contradicted" else np.ones(len(seen["key"]), dtype=bool)
            if eligible.any():
                self._merge(why, {name: value[eligible] for name, value in seen.items()}, epoch)

    def _select(self, order: Tensor, contradicted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the positions (i, j) of the pairs that may enter a table, each at least once.

        Excludes pairs that rank below the last entry of a full table, and pairs that rank below as many others of the
        same batch as the table holds.
        """
        first = {why: int(_score(why, table["order"]).min()) if len(table["key"]) >= self.kept[why] else 0
                 for why, table in self.tables.items()}  # fmt: skip
        wanted = order >= first["strongest"]
        wanted |= _nearest(order, first["borderline"])
        if contradicted is not None:
            wanted |= contradicted & (order >= first["contradicted"])
        i, j = wanted.nonzero(as_tuple=True)
        candidates = order[i, j]
        needed = torch.zeros_like(candidates, dtype=torch.bool)
        for why, kept in self.kept.items():
            score = _score(why, candidates)
            if why == "contradicted":
                if contradicted is None:
                    continue
                score = score.where(contradicted[i, j], -1)
            needed |= score >= max(first[why], _last_of(score, kept))
        return i[needed], j[needed]

    def _merge(self, why: str, seen: Table, epoch: int) -> None:
        table = self.tables[why]
        new = ~np.isin(seen["key"], table["key"])
        fresh = self._nothing(int(new.sum()))
        for name in ("key", "labels_known", "labels_differ"):
            fresh[name] = seen[name][new]
        fresh["first_epoch"] += epoch
        joined = {name: np.concatenate([table[name], fresh[name]]) for name in table}
        places = np.argsort(joined["key"])
        at = places[np.searchsorted(joined["key"], seen["key"], sorter=places)]
        corrected = seen["corrected"].astype(bool)
        joined["suspected_batches"][at] += 1
        joined["suspected_epochs"][at] += joined["last_epoch"][at] != epoch
        joined["last_epoch"][at] = epoch
        joined["corrected_batches"][at] += corrected
        joined["corrected_epochs"][at] += corrected & (joined["last_corrected_epoch"][at] != epoch)
        joined["last_corrected_epoch"][at[corrected]] = epoch
        stronger = seen["order"] > joined["order"][at]
        for name in ("order", *self.kinds):
            joined[name][at[stronger]] = seen[name][stronger]
        best = np.lexsort((joined["key"], -_score(why, joined["order"])))[: self.kept[why]]
        self.tables[why] = {name: column[best] for name, column in joined.items()}

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: tensors and numbers only."""
        tables = {why: {n: torch.from_numpy(c.copy()) for n, c in table.items()} for why, table in self.tables.items()}
        return {"totals": dict(self.totals), "tables": tables}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore `state`. Tables of older checkpoints, which had another order, are dropped: counting restarts."""
        self.totals = {name: int(count) for name, count in state["totals"].items()}
        if all("order" in table for table in state["tables"].values()):
            self.tables = {
                why: {name: column.numpy().copy() for name, column in table.items()}
                for why, table in state["tables"].items()
            }

    def frame(self, studies: Mapping[int, str], thresholds: Mapping[str, float]) -> pd.DataFrame:
        """Return the kept pairs, one row per pair (`align/corrected.csv`, docs/contracts.md).

        Args:
            studies: Study ids by study code.
            thresholds: Final threshold per kind.
        """
        why: dict[int, list[str]] = {}
        held: dict[int, dict[str, Any]] = {}
        for name, table in self.tables.items():
            for place, key in enumerate(table["key"].tolist()):
                why.setdefault(key, []).append(name)
                # A pair that left a table and re-entered it by a higher `ema` may have complete counts in one table only.
                if key not in held or held[key]["suspected_batches"] < table["suspected_batches"][place]:
                    held[key] = {column: values[place].item() for column, values in table.items()}
        rows = []
        for key, row in held.items():
            passed = [kind for kind in self.kinds if row[kind] >= thresholds[kind] - _ROUNDED]
            rows.append({
                "study_id": studies[key >> 32], "other_study_id": studies[key & 0xFFFFFFFF],
                "kept_as": "+".join(why[key]), "evidence": "+".join(passed),
                "strength": (row["order"] >> HASH_BITS) / STEPS, **row,
            })  # fmt: skip
        columns = [
            "study_id",
            "other_study_id",
            "kept_as",
            "evidence",
            "strength",
            *self.kinds,
            *(name for name in _COUNTS if name != "last_corrected_epoch"),
        ]
        return pd.DataFrame(rows, columns=columns)

    def write(self, path: Path, studies: Mapping[int, str], thresholds: Mapping[str, float]) -> None:
        """Write `frame` as CSV, atomically."""
        write_text(path, self.frame(studies, thresholds).to_csv(index=False, float_format="%.6f"))


def _score(why: str, order: Any) -> Any:
    """Return the sort key of a table, largest first: the pair's order; for `borderline`, the weakest pair first.

    Args:
        why: The table.
        order: int64 of `pair_order`, a tensor or an array, without negative values.
    """
    return ((STEPS - (order >> HASH_BITS)) << HASH_BITS) | (order & _HASH) if why == "borderline" else order


def _nearest(order: Tensor, first: int) -> Tensor:
    """Return (B, B) bool: candidates whose `borderline` score is at least `first`, without computing all scores."""
    strength = (
        STEPS - (first >> HASH_BITS)
    ) << HASH_BITS  # strength of the last kept pair, in the high bits of `order`
    as_strong = (order >= strength | (first & _HASH)) & (order < strength + (1 << HASH_BITS))
    return as_strong | ((order < strength) & (order >= 0))


def _last_of(score: Tensor, kept: int) -> int:
    """Return the lowest score among the `kept` best pairs of studies; 0 if there are no more pairs than that.

    A pair of studies may occur several times: as (i, j) and (j, i), and with several images of a study.
    """
    taken = 4 * kept
    while taken < len(score):
        first = score.topk(taken).values
        if len(torch.unique(first & _HASH)) >= kept:
            return max(0, int(first[-1]))
        taken *= 4
    return 0


def _label_agreement(labels: Tensor | None, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """Count, per pair, the findings labelled 1 or 0 in both studies, and those that differ; both (P,) int64."""
    if labels is None or not labels.shape[1]:
        return torch.zeros_like(i), torch.zeros_like(i)
    known = (labels == 1) | (labels == 0)
    both = known[i] & known[j]
    return both.sum(dim=1), (both & (labels[i] != labels[j])).sum(dim=1)


def _once(seen: Table, kinds: Sequence[str]) -> Table:
    """Deduplicate pairs, keeping the strongest: a batch has each in both orders, and may have several images per study."""
    order = np.lexsort((*(-seen[kind] for kind in kinds), -seen["order"], seen["key"]))
    keys, first = np.unique(seen["key"][order], return_index=True)
    corrected = np.zeros(len(keys), dtype=bool)
    np.logical_or.at(corrected, np.searchsorted(keys, seen["key"]), seen["corrected"].astype(bool))
    return {name: value[order][first] for name, value in seen.items()} | {"corrected": corrected}
