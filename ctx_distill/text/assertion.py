"""Classify mentions as present, absent or uncertain from the cues of their sentence.

The rules are those of NegEx (Chapman et al. 2001, doi:10.1006/jbin.2001.1029), with scopes for enumerations and for
negations that follow the mention.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ctx_distill.text.phrases import BREAKS, PhraseIndex, stem, words

PRESENT, ABSENT, UNCERTAIN = 1, 0, -1

_DENIED_WORDS = 8
_COPULAS = frozenset(
    ["is", "are", "was", "were", "has", "have", "had", "show", "appear", "remain", "demonstrate", "contain"]
)
_AUXILIARIES = frozenset(
    [
        "is",
        "are",
        "was",
        "were",
        "has",
        "have",
        "had",
        "been",
        "be",
        "can",
        "could",
        "do",
        "did",
        "doe",
        "also",
        "clearly",
        "definitely",
    ]
)
_RELATIVE = frozenset(["which", "that", "whose", "where"])
_PARTS = frozenset(["level", "wall", "branch", "part", "segment", "lobe", "origin", "ostium", "half", "side"])
_CUES_FILE = Path(__file__).with_name("vocabularies") / "cues.yaml"


@dataclass(frozen=True)
class _Cue:
    kind: str
    start: int
    end: int


class Sentence:
    """The words and cues of one sentence."""

    def __init__(self, text: str) -> None:
        """Parse one sentence."""
        self._index, self._detection, self._statement_starts = _cues()
        self.tokens = words(text)

    @functools.cached_property
    def _cues(self) -> list[_Cue]:
        """The cues ordered by end: looking back from a mention, the nearest cue is the one that ends last."""
        return [_Cue(kind, start, end) for start, end, _, kind in self._index.find(self.tokens)]

    def assertion(self, start: int, end: int) -> int | None:
        """Return PRESENT, ABSENT or UNCERTAIN for the mention tokens[start:end]; None if nothing is asserted.

        A cue after the mention ("... is not seen") takes precedence over one before it ("no ..."), and the nearest cue
        over others.
        """
        closed = len(self.tokens)  # a cue of both kinds ("absent") applies backwards before it closes the scope
        for cue in self._cues:
            if cue.kind == "pseudo" and cue.start < start < cue.end:
                return ABSENT  # "no increase in wall thickness", where the increase is the finding
            if cue.start < end:
                continue
            if cue.start > closed:
                break
            if cue.kind in ("scope_end", "negation_before", "hypothetical"):
                closed = cue.start
            if cue.kind.endswith("_after") and self._reaches_back(cue, start, end):
                return ABSENT if cue.kind == "negation_after" else UNCERTAIN
        for cue in reversed(self._cues):
            if cue.end > start:
                continue
            if cue.kind in ("scope_end", "blocks_forward"):
                break
            if cue.kind in ("negation_before", "uncertain_before", "hypothetical"):
                if self._closed(cue.end, start):
                    break
                if cue.kind == "uncertain_before" and self._denied(cue):
                    return ABSENT
                return {"negation_before": ABSENT, "uncertain_before": UNCERTAIN}.get(cue.kind)
        return PRESENT

    def _denied(self, doubt: _Cue) -> bool:
        """Return whether a doubt is itself negated: "no finding suggestive of", "no evidence to suggest"."""
        return any(
            cue.kind == "negation_before"
            and doubt.start - _DENIED_WORDS <= cue.end <= doubt.start
            and not BREAKS.intersection(self.tokens[cue.end : doubt.start])
            for cue in self._cues
        )

    def clause(self, start: int, end: int) -> tuple[int, int]:
        """Return the clause of tokens[start:end] as (first word, one past the last).

        A clause ends at a semicolon, at a word such as "but", and at a comma between two verbs.
        """
        low, high = 0, len(self.tokens)
        for begin, behind in self._clause_ends:
            if behind <= start:
                low = max(low, behind)
            elif begin >= end:
                high = min(high, begin)
        return low, high

    @functools.cached_property
    def _clause_ends(self) -> list[tuple[int, int]]:
        ends = [(cue.start, cue.end) for cue in self._cues if cue.kind == "scope_end"]
        verbs = [i for i, token in enumerate(self.tokens) if self._is_verb(token)]
        opened = 0
        commas = [
            i for i, pair in enumerate(itertools.pairwise(self.tokens)) if pair[0] == "," and pair[1] not in _RELATIVE
        ]
        for here, following in zip(commas, [*commas[1:], len(self.tokens)]):
            if any(opened <= i < here for i in verbs) and any(here < i < following for i in verbs):
                ends.append((here, here + 1))
                opened = here
        return ends

    def enumeration(self, start: int, end: int) -> tuple[int, int]:
        """Return the part of the clause between commas around tokens[start:end], with the enumeration after it.

        A part with its own preposition ("dilatation in the ascending aorta") does not continue an enumeration.
        """
        low, high = self.clause(start, end)
        begin = max((i + 1 for i in range(low, start) if self.tokens[i] in (",", "(")), default=low)
        behind = next((i for i in range(end, high) if self.tokens[i] == ","), high)
        while behind < high:
            following = next((i for i in range(behind + 1, high) if self.tokens[i] == ","), high)
            part = self.tokens[behind + 1 : following]
            if any(
                (word == "in" and before not in ("and", "or")) or (word == "of" and before not in _PARTS)
                for before, word in itertools.pairwise(part)
            ):
                break
            behind = following
        return begin, behind

    def is_prose(self, start: int, end: int) -> bool:
        """Return whether tokens[start:end] contains a verb, so that its commas do not separate list items."""
        return any(self._is_verb(token) for token in self.tokens[start:end])

    def cues(self) -> list[tuple[int, int, str]]:
        """Return the cues as (first word, one past the last word, kind in cues.yaml), in order."""
        return [(cue.start, cue.end, cue.kind) for cue in self._cues]

    def interrupted(self, start: int, end: int) -> bool:
        """Return whether a negation or an end of scope is within tokens[start:end], the span of a gapped phrase."""
        return "not" in self.tokens[start:end] or any(
            start < cue.start
            and cue.end < end
            and cue.kind in ("scope_end", "negation_before", "negation_after", "blocks_forward")
            for cue in self._cues
        )

    def _is_verb(self, token: str) -> bool:
        return token in _COPULAS or token in self._detection

    def _reaches_back(self, cue: _Cue, start: int, end: int) -> bool:
        """Return whether a cue after a mention applies to it, and not only to a later one in the same clause."""
        between = _without_relative(self.tokens[end : cue.start])
        # "nodule (metastasis?)", "opacity, atelectasis vs. pneumonia": the doubt applies to the adjacent word
        if self.tokens[cue.start] in ("?", "v", "vs", "versus"):
            return not any(token in BREAKS for token in between)
        if "(" in between and ")" not in between:
            return False
        while between and between[-1] in _AUXILIARIES:
            between = between[:-1]
        parted = "," in between or "and" in between
        for before, token in itertools.pairwise(["", *between]):
            # "the nodule observed in the upper lobe has resolved": a participle without auxiliary is not a verb
            if token in _COPULAS or (token in self._detection and (parted or before in _AUXILIARIES)):
                return False
        return not (parted and any(self._is_verb(token) for token in self._same_clause(start)))

    def _same_clause(self, start: int) -> list[str]:
        ends = [cue.end for cue in self._cues if cue.kind == "scope_end" and cue.end <= start]
        return self.tokens[max(ends, default=0) : start]

    def _closed(self, start: int, end: int) -> bool:
        """Return whether the scope of a cue that ends at `start` is closed before the mention at `end`."""
        complete = False  # the statement of the cue has its verb: "No nodule was detected, ..."
        for i in range(start, end):
            token = self.tokens[i]
            if token in self._detection and i > start:  # "no visible pneumothorax" has none
                complete = True
            if token not in (",", "and", ")"):
                continue
            if self.tokens[i + 1 : i + 2] == [","] or (token == "," and self.tokens[i + 1 : i + 2] == ["and"]):
                continue
            rest = self.tokens[i + 1 :]
            segment = rest[: rest.index(",")] if "," in rest else rest
            if (
                segment
                and segment[0] in self._statement_starts
                and (segment[0] == "there" or not {"or", "nor"} & set(rest))
            ):
                return True
            for word, following in zip(segment, [*segment[1:], ""]):
                if word in _COPULAS and following not in self._detection and following not in ("not", "also"):
                    return True
                if complete and word in self._detection:
                    return True
        return False


def _without_relative(between: list[str]) -> list[str]:
    """Remove relative clauses, such as ", which was seen in the previous examination,"."""
    kept: list[str] = []
    skipping = False
    for i, token in enumerate(between):
        if token == "which" and "," in between[i:]:
            skipping = True
            if kept[-1:] == [","]:
                kept.pop()
        elif skipping:
            skipping = token != ","
        else:
            kept.append(token)
    return kept


@functools.cache
def _cues() -> tuple[PhraseIndex[str], frozenset[str], frozenset[str]]:
    """Load the shipped cues: (index of phrases by kind, words of detection, words that start a new statement)."""
    raw: dict[str, Any] = yaml.safe_load(_CUES_FILE.read_text(encoding="utf-8"))
    detection = frozenset(stem(word) for word in raw.pop("detection"))
    statement_starts = frozenset(stem(word) for word in raw.pop("own_statement"))
    index: PhraseIndex[str] = PhraseIndex()
    for kind, phrases in raw.items():
        for phrase in phrases:
            index.add(phrase, kind)
    for word in detection:
        for prefix in ("not", "not been", "not be", "not clearly", "not definitely", "never", "no longer"):
            index.add(f"{prefix} {word}", "negation_after")
    return index, detection, statement_starts
