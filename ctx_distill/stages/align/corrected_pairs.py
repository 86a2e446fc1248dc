"""Which pairs stage 3 took for false negatives: a bounded record of them, the same on every rank and after a resume.

A batch of 2,048 studies suspects up to 2 million pairs, and 300 pairs are kept. So a pair goes to the host only if it may
be kept: the pairs of a batch are compared on its device with the last that each table holds.
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
"""Pairs kept: the strongest, the strongest that labels contradict, and those nearest to the threshold."""
DECIMALS = 6
"""Of the evidence as it is written."""
_ROUNDED = TOLERANCE + 0.5 * 10**-DECIMALS
"""What evidence that passed its threshold may lie below it once it is rounded."""
_HASH = (1 << HASH_BITS) - 1
_COUNTS = ("suspected_batches", "corrected_batches", "suspected_epochs", "corrected_epochs", "first_epoch", "last_epoch",
           "last_corrected_epoch", "labels_known", "labels_differ")  # fmt: skip
Table = dict[str, NDArray[Any]]


class CorrectedPairs:
    """The pairs of studies that were suspected, as far as they are kept, with how often and when.

    A pair is one of studies, whichever is the image: it counts once a batch. What is kept is ordered by strength and
    then by a hash of the pair (`losses.pair_order`), a total order that does not change while a pair's evidence does not:
    so a pair that is kept has been kept since it was first seen, and its counts are whole. The evidence `ema` does
    change; a pair that rises by it later is counted from then on.

    Attributes:
        kinds: evidence in use.
        tables: what is kept, by why: `key` (the two study codes), `order` (of the pair when it was strongest), counts,
            and a value for each kind.
        totals: pairs of images, in whichever order, suspected and corrected so far over all batches.
    """

    def __init__(self, kinds: Sequence[str], kept: Mapping[str, int] = KEPT) -> None:
        """Begin with nothing.

        Args:
            kinds: evidence in use (`EvidenceKind`).
            kept: how many pairs of each sort are kept.
        """
        self.kinds, self.kept = tuple(kinds), dict(kept)
        self.tables = {why: self._nothing() for why in self.kept}
        self.totals = {"suspected": 0, "corrected": 0}

    def _nothing(self, rows: int = 0) -> Table:
        """A table of pairs that were never seen."""
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
        """Take the pairs of a global batch in.

        Args:
            correction: of the batch.
            evidence: (B, B) by kind.
            study: (B,) int64, gathered.
            labels: (B, F) gathered, 1, 0, -1 or NaN; None without.
            contradicted: (B, B) bool, the pairs whose labels differ (`robust.contradictions`); None without labels.
            epoch: the current one.
        """
        order, twice = correction.order, torch.stack([correction.suspected, correction.corrected])
        if "ema" in self.kinds:  # alone in that (i, j) is unlike (j, i)
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
            mine = seen["labels_differ"] > 0 if why == "contradicted" else np.ones(len(seen["key"]), dtype=bool)
            if mine.any():
                self._merge(why, {name: value[mine] for name, value in seen.items()}, epoch)

    def _select(self, order: Tensor, contradicted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Places (i, j) of the pairs that a table keeps or may come to keep, each at least once.

        Not those behind the last of a full table: it orders all pairs. And not those behind as many others of the
        same batch as the table holds: these would push them out.
        """
        first = {why: int(_score(why, table["order"]).min()) if len(table["key"]) >= self.kept[why] else 0
                 for why, table in self.tables.items()}  # fmt: skip
        wanted = order >= first["strongest"]
        wanted |= _nearest(order, first["borderline"])
        if contradicted is not None:
            wanted |= contradicted & (order >= first["contradicted"])
        i, j = wanted.nonzero(as_tuple=True)
        found = order[i, j]
        needed = torch.zeros_like(found, dtype=torch.bool)
        for why, kept in self.kept.items():
            score = _score(why, found)
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
        """For the checkpoint: tensors and numbers alone."""
        tables = {why: {n: torch.from_numpy(c.copy()) for n, c in table.items()} for why, table in self.tables.items()}
        return {"totals": dict(self.totals), "tables": tables}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take `state` back. Pairs that a checkpoint kept by another order are not: they count from here on."""
        self.totals = {name: int(count) for name, count in state["totals"].items()}
        if all("order" in table for table in state["tables"].values()):
            self.tables = {why: {n: c.numpy().copy() for n, c in own.items()} for why, own in state["tables"].items()}

    def frame(self, studies: Mapping[int, str], thresholds: Mapping[str, float]) -> pd.DataFrame:
        """What is kept, a row a pair (`align/corrected.csv`, docs/contracts.md).

        Args:
            studies: study ids by the integers of the batches.
            thresholds: by kind, at the end.
        """
        why: dict[int, list[str]] = {}
        held: dict[int, dict[str, Any]] = {}
        for name, table in self.tables.items():
            for place, key in enumerate(table["key"].tolist()):
                why.setdefault(key, []).append(name)
                # One that fell out of a table and came in again by a higher `ema` has whole counts in none or one.
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
        """Write `frame` as CSV, whole or not at all."""
        write_text(path, self.frame(studies, thresholds).to_csv(index=False, float_format="%.6f"))


def _score(why: str, order: Any) -> Any:
    """By which a table keeps pairs, the largest first: their order, or for `borderline` the weakest first, then as before.

    Args:
        why: the table.
        order: int64 of `pair_order`, a tensor or an array, none negative.
    """
    return ((STEPS - (order >> HASH_BITS)) << HASH_BITS) | (order & _HASH) if why == "borderline" else order


def _nearest(order: Tensor, first: int) -> Tensor:
    """(B, B) bool: candidates whose `_score` for `borderline` is `first` or more, without the scores of all."""
    strength = (STEPS - (first >> HASH_BITS)) << HASH_BITS  # of the last pair held: in steps, where `order` has them
    as_strong = (order >= strength | (first & _HASH)) & (order < strength + (1 << HASH_BITS))
    return as_strong | ((order < strength) & (order >= 0))


def _last_of(score: Tensor, kept: int) -> int:
    """The smallest score of the `kept` first pairs of studies; 0 where there are no more than that.

    A pair of studies may come several times: as (i, j) and (j, i), and with several images of a study.
    """
    taken = 4 * kept
    while taken < len(score):
        first = score.topk(taken).values
        if len(torch.unique(first & _HASH)) >= kept:
            return max(0, int(first[-1]))
        taken *= 4
    return 0


def _label_agreement(labels: Tensor | None, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """Findings whose label is 1 or 0 in both studies of each pair, and those of them that differ; (P,) int64."""
    if labels is None or not labels.shape[1]:
        return torch.zeros_like(i), torch.zeros_like(i)
    known = (labels == 1) | (labels == 0)
    both = known[i] & known[j]
    return both.sum(dim=1), (both & (labels[i] != labels[j])).sum(dim=1)


def _once(seen: Table, kinds: Sequence[str]) -> Table:
    """Each pair once, as it is strongest: a batch holds it in both orders, and may hold several images of a study."""
    order = np.lexsort((*(-seen[kind] for kind in kinds), -seen["order"], seen["key"]))
    keys, first = np.unique(seen["key"][order], return_index=True)
    corrected = np.zeros(len(keys), dtype=bool)
    np.logical_or.at(corrected, np.searchsorted(keys, seen["key"]), seen["corrected"].astype(bool))
    return {name: value[order][first] for name, value in seen.items()} | {"corrected": corrected}
