"""Which pairs stage 3 took for false negatives: a bounded record of them, the same on every rank and after a resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ctx_distill.files import write_text
from ctx_distill.losses.pair_order import strength_of
from ctx_distill.losses.robust import Correction, identify

KEPT = {"strongest": 200, "contradicted": 50, "borderline": 50}
"""Pairs kept: the strongest, the strongest that labels contradict, and those nearest to the threshold."""
MARGIN = 1e-3
"""Strengths of a batch's matrix are taken to be right to this much; those of what is kept are computed again."""
BLOCK = 4096
_COUNTS = ("key", "suspected_batches", "corrected_batches", "suspected_epochs", "corrected_epochs", "first_epoch",
           "last_epoch", "last_corrected_epoch", "labels_known", "labels_differ")  # fmt: skip
Table = dict[str, NDArray[Any]]


class CorrectedPairs:
    """The pairs of studies that were suspected, as far as they are kept, with how often and when.

    A pair is one of studies, whichever is the image: it counts once a batch. What is kept is ordered by strength and
    then by a hash of the pair, a total order that does not change while a pair's evidence does not: so a pair that is kept
    has been kept since it was first seen, and its counts are whole. The evidence `ema` does change; a pair that rises by
    it later is counted from then on. The evidence of frozen models is computed for each pair alone, in float64 and to
    six decimals, since a matrix product gives other last bits in another batch.

    Attributes:
        kinds: evidence in use.
        tables: what is kept, by why.
        totals: pairs of images, in whichever order, suspected and corrected so far over all batches.
    """

    def __init__(self, kinds: Sequence[str], kept: Mapping[str, int] = KEPT) -> None:
        """Begin with nothing.

        Args:
            kinds: evidence in use (`EvidenceKind`).
            kept: how many pairs of each sort are kept.
        """
        self.kinds, self.kept = tuple(kinds), dict(kept)
        columns = {**dict.fromkeys(_COUNTS, np.int64), **dict.fromkeys(("strength", *self.kinds), np.float64)}
        self.tables: dict[str, Table] = {
            why: {name: np.zeros(0, dtype=dtype) for name, dtype in columns.items()} for why in self.kept
        }
        self.totals = {"suspected": 0, "corrected": 0}

    @torch.no_grad()
    def observe(
        self,
        correction: Correction,
        evidence: Mapping[str, Tensor],
        features: Mapping[str, Tensor],
        study: Tensor,
        thresholds: Mapping[str, float],
        combine: Literal["any", "all"],
        labels: Tensor | None,
        epoch: int,
    ) -> None:
        """Take the pairs of a global batch in.

        Args:
            correction: of the batch.
            evidence: (B, B) by kind.
            features: (B, D) by kind, of which the cosine kinds but `ema` were made.
            study: (B,) int64, gathered.
            thresholds: by kind, as `identify` got them.
            combine: as `identify` got it.
            labels: (B, F) gathered, 1, 0, -1 or NaN; None without.
            epoch: the current one.
        """
        first = study[:, None] < study[None, :]
        pairs = (correction.pairs | correction.pairs.T) & first
        chosen = (correction.chosen | correction.chosen.T) & first
        strength = strength_of(correction.order)
        strength = torch.maximum(strength, strength.T)
        wanted = self._may_be_kept(strength, _contradictions(labels, study))
        i, j = (pairs & wanted).nonzero(as_tuple=True)
        self.totals["suspected"] += int(pairs.sum())
        self.totals["corrected"] += int(chosen.sum())
        if not len(i):
            return
        values = {kind: self._pair_values(kind, evidence[kind], features, i, j) for kind in self.kinds}
        exact = identify(values, thresholds, combine)[1]
        seen: Table = {name: value.cpu().numpy() for name, value in values.items()}
        seen |= {"strength": exact.cpu().numpy().round(6), "corrected": chosen[i, j].cpu().numpy()}
        codes = study.cpu().numpy().astype(np.int64)
        seen["key"] = (codes[i.cpu().numpy()] << 32) | codes[j.cpu().numpy()]
        known, differ = _label_agreement(labels, i, j)
        seen |= {"labels_known": known, "labels_differ": differ}
        seen = _once(seen)
        for why in self.tables:
            mine = seen["labels_differ"] > 0 if why == "contradicted" else np.ones(len(seen["key"]), dtype=bool)
            if mine.any():
                self._merge(why, {name: value[mine] for name, value in seen.items()}, epoch)

    def _may_be_kept(self, strength: Tensor, contradicted: Tensor) -> Tensor:
        """(B, B) bool: what a table has room for, by the matrix's own strengths."""
        wanted = torch.zeros_like(contradicted)
        for why, table in self.tables.items():
            full = len(table["key"]) >= self.kept[why]
            if why == "borderline":
                wanted |= strength <= (float(table["strength"].max()) + MARGIN if full else torch.inf)
            else:
                enough = strength >= (float(table["strength"].min()) - MARGIN if full else -torch.inf)
                wanted |= enough & contradicted if why == "contradicted" else enough
        return wanted

    def _pair_values(self, kind: str, matrix: Tensor, features: Mapping[str, Tensor], i: Tensor, j: Tensor) -> Tensor:
        if kind in ("findings", "ema"):
            return torch.maximum(matrix[i, j], matrix[j, i]).double()
        rows = F.normalize(features[kind].double(), dim=-1)
        parts = [(rows[i[at : at + BLOCK]] * rows[j[at : at + BLOCK]]).sum(dim=-1) for at in range(0, len(i), BLOCK)]
        return (torch.cat(parts) * 1e6).round() / 1e6

    def _merge(self, why: str, seen: Table, epoch: int) -> None:
        table = self.tables[why]
        new = ~np.isin(seen["key"], table["key"])
        fresh = {name: np.zeros(int(new.sum()), dtype=column.dtype) for name, column in table.items()}
        for name in ("key", "labels_known", "labels_differ"):
            fresh[name] = seen[name][new].astype(np.int64)
        fresh["strength"] -= 1.0
        fresh["first_epoch"] += epoch
        for name in ("last_epoch", "last_corrected_epoch"):
            fresh[name] -= 1
        joined = {name: np.concatenate([table[name], fresh[name]]) for name in table}
        order = np.argsort(joined["key"])
        at = order[np.searchsorted(joined["key"], seen["key"], sorter=order)]
        corrected = seen["corrected"].astype(bool)
        joined["suspected_batches"][at] += 1
        joined["suspected_epochs"][at] += joined["last_epoch"][at] != epoch
        joined["last_epoch"][at] = epoch
        joined["corrected_batches"][at] += corrected
        joined["corrected_epochs"][at] += corrected & (joined["last_corrected_epoch"][at] != epoch)
        joined["last_corrected_epoch"][at[corrected]] = epoch
        stronger = seen["strength"] > joined["strength"][at]
        for name in ("strength", *self.kinds):
            joined[name][at[stronger]] = seen[name][stronger]
        score = joined["strength"] if why == "borderline" else -joined["strength"]
        best = np.lexsort((_mixed(joined["key"]), score))[: self.kept[why]]
        self.tables[why] = {name: column[best] for name, column in joined.items()}

    def state(self) -> dict[str, Any]:
        """For the checkpoint: tensors and numbers alone."""
        tables = {why: {n: torch.from_numpy(c.copy()) for n, c in table.items()} for why, table in self.tables.items()}
        return {"totals": dict(self.totals), "tables": tables}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take `state` back."""
        self.totals = {name: int(count) for name, count in state["totals"].items()}
        self.tables = {why: {n: c.numpy().copy() for n, c in table.items()} for why, table in state["tables"].items()}

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
            passed = [kind for kind in self.kinds if row[kind] >= thresholds[kind] - 1e-6]
            rows.append({
                "study_id": studies[key >> 32], "other_study_id": studies[key & 0xFFFFFFFF],
                "kept_as": "+".join(why[key]), "evidence": "+".join(passed), **row,
            })  # fmt: skip
        columns = [
            "study_id",
            "other_study_id",
            "kept_as",
            "evidence",
            "strength",
            *self.kinds,
            *_COUNTS[1:7],
            *_COUNTS[8:],
        ]
        return pd.DataFrame(rows, columns=columns)

    def write(self, path: Path, studies: Mapping[int, str], thresholds: Mapping[str, float]) -> None:
        """Write `frame` as CSV, whole or not at all."""
        write_text(path, self.frame(studies, thresholds).to_csv(index=False, float_format="%.6f"))


def _contradictions(labels: Tensor | None, study: Tensor) -> Tensor:
    """(B, B) bool: labels of both are known for a finding, and differ."""
    if labels is None or not labels.shape[1]:
        return torch.zeros(len(study), len(study), dtype=torch.bool, device=study.device)
    present, absent = (labels == 1).float(), (labels == 0).float()
    opposed = present @ absent.T
    return (opposed + opposed.T) > 0


def _label_agreement(labels: Tensor | None, i: Tensor, j: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Findings whose label is 1 or 0 in both studies of each pair, and those of them that differ."""
    if labels is None or not labels.shape[1]:
        none = np.zeros(len(i), dtype=np.int64)
        return none, none.copy()
    known = (labels == 1) | (labels == 0)
    both = known[i] & known[j]
    return both.sum(dim=1).cpu().numpy(), (both & (labels[i] != labels[j])).sum(dim=1).cpu().numpy()


def _once(seen: Table) -> Table:
    """Each pair once, as it is strongest: a batch may hold several images of a study."""
    order = np.lexsort((-seen["strength"], seen["key"]))
    keys, first = np.unique(seen["key"][order], return_index=True)
    corrected = np.zeros(len(keys), dtype=bool)
    np.logical_or.at(corrected, np.searchsorted(keys, seen["key"]), seen["corrected"])
    return {name: value[order][first] for name, value in seen.items()} | {"corrected": corrected}


def _mixed(keys: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A fixed hash of pairs (splitmix64), so that ties do not all fall on the studies that come first."""
    mixed = keys.astype(np.uint64)
    with np.errstate(over="ignore"):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    out: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return out
