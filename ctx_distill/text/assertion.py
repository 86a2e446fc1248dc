"""Present, absent or uncertain: which cue of a sentence reaches which mention in it.

Words are matched, not characters: phrases live in a dictionary of dictionaries of stemmed words, so that thousands of
short reports a second can be read and a vocabulary may grow without cost. The rules are NegEx's (Chapman et al. 2001,
doi:10.1006/jbin.2001.1029) with scopes for enumerations and for negations that stand behind what they negate.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

T = TypeVar("T")

PRESENT, ABSENT, UNCERTAIN = 1, 0, -1

_TOKEN = re.compile(r"[^\W_]+(?:\.\d+)?|[,;:?()]")
_CONTRACTED = re.compile("n['’]t")
_GAP = "..."
_GAP_WORDS = 8
_BREAKS = frozenset(",;:?()")
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
_CUES_FILE = Path(__file__).with_name("vocabularies") / "cues.yaml"


@functools.lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """A word without its plural ending: nodules -> nodule, opacities -> opacity, masses -> mass, stenosis unchanged."""
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("sses", "ches", "shes", "xes")):
        return word[:-2]
    return word[:-1]


def _lower(text: str) -> str:
    lowered = text.lower()
    # the small letters of a few capitals ("İ") are two characters, after which no place would fit the text
    return lowered if len(lowered) == len(text) else "".join(c.lower()[0] for c in text)


def words(text: str) -> list[str]:
    """Stemmed lower-case words and the marks , ; : ? ( ) of a text; hyphens, slashes and periods part words."""
    return [stem(word) for word in _TOKEN.findall(_CONTRACTED.sub(" not", _lower(text)))]


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where each of `words(text)` stands: its first character and one past its last; "n't" stands for "not"."""
    lowered = _lower(text)
    spaces = [match.start() + i for i, match in enumerate(_CONTRACTED.finditer(lowered))]
    matches = _TOKEN.finditer(_CONTRACTED.sub(" not", lowered))
    return [
        (match.start() - bisect_left(spaces, match.start()), match.end() - bisect_left(spaces, match.end()))
        for match in matches
    ]


@dataclass
class _Node(Generic[T]):
    payloads: list[T] = field(default_factory=list)
    children: dict[str, _Node[T]] = field(default_factory=dict)


class PhraseIndex(Generic[T]):
    """Phrases with payloads, found in a list of words: the longest at each place, left to right, without overlap.

    A phrase may hold gaps, written "...": up to eight words and no punctuation ("heart ... normal"). Phrases with
    gaps are found beside the others and hide none of them.
    """

    def __init__(self) -> None:
        self._root: _Node[T] = _Node()
        self._gapped: dict[str, list[tuple[list[list[str]], T]]] = {}

    def add(self, phrase: str, payload: T | None) -> None:
        """Adds a phrase; one without a payload only hides the shorter phrases inside it."""
        parts = [words(part) for part in phrase.split(_GAP)]
        if not all(parts):
            raise ValueError(f"the phrase {phrase!r} holds no word, or nothing before or after '...'")
        if len(parts) > 1:
            if payload is not None:
                self._gapped.setdefault(parts[0][0], []).append((parts, payload))
            return
        node = self._root
        for word in parts[0]:
            node = node.children.setdefault(word, _Node())
        if payload is None:
            # a leaf without payloads must still count as a match
            node.children.setdefault("", _Node())
        elif payload not in node.payloads:
            node.payloads.append(payload)

    def find(self, tokens: Sequence[str]) -> list[tuple[int, int, bool, T]]:
        """Matches as (first word, one behind the last word, whether the phrase has gaps, payload), by place."""
        found: list[tuple[int, int, bool, T]] = []
        free_from = 0
        for i, token in enumerate(tokens):
            for parts, payload in self._gapped.get(token, ()):
                end = _match_gapped(tokens, i, parts)
                if end:
                    found.append((i, end, True, payload))
            if i < free_from:
                continue
            node: _Node[T] | None = self._root
            best: tuple[int, list[T]] | None = None
            for j in range(i, len(tokens)):
                node = node.children.get(tokens[j]) if node else None
                if node is None:
                    break
                if node.payloads or "" in node.children:
                    best = j + 1, node.payloads
            if best:
                free_from = best[0]
                found.extend((i, best[0], False, payload) for payload in best[1])
        return found


def _match_gapped(tokens: Sequence[str], start: int, parts: list[list[str]]) -> int:
    """One behind the last word of a gapped phrase that begins at `start`; 0 where it does not stand there."""
    end = start + len(parts[0])
    if list(tokens[start:end]) != parts[0]:
        return 0
    for part in parts[1:]:
        for skip in range(_GAP_WORDS + 1):
            at = end + skip
            if list(tokens[at : at + len(part)]) == part:
                end = at + len(part)
                break
            if at >= len(tokens) or tokens[at] in _BREAKS:
                return 0
        else:
            return 0
    return end


@dataclass(frozen=True)
class _Cue:
    kind: str
    start: int
    end: int


class Sentence:
    """The words of one sentence with the cues found in them."""

    def __init__(self, text: str) -> None:
        """Args: text: one sentence."""
        index, self._detection, self._own = _cues()
        self.tokens = words(text)
        # by end, not by start: looking back from a mention, the nearest cue is the one that ends last
        self._cues = [_Cue(kind, start, end) for start, end, _, kind in index.find(self.tokens)]

    def assertion(self, start: int, end: int) -> int | None:
        """PRESENT, ABSENT or UNCERTAIN for the mention tokens[start:end]; None where nothing is said of it.

        A cue behind the mention ("... is not seen") outranks one before it ("no ..."); of several, the nearest.
        """
        for cue in self._cues:
            if cue.start < end:
                continue
            if cue.kind in ("scope_end", "negation_before", "hypothetical"):
                break
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
                return {"negation_before": ABSENT, "uncertain_before": UNCERTAIN}.get(cue.kind)
        return PRESENT

    def cues(self) -> list[tuple[int, int, str]]:
        """The cues as (first word, one behind the last word, kind in cues.yaml), by place."""
        return [(cue.start, cue.end, cue.kind) for cue in self._cues]

    def interrupted(self, start: int, end: int) -> bool:
        """Whether a negation or an end of scope lies within tokens[start:end], the span of a phrase with gaps."""
        return "not" in self.tokens[start:end] or any(
            start < cue.start
            and cue.end < end
            and cue.kind in ("scope_end", "negation_before", "negation_after", "blocks_forward")
            for cue in self._cues
        )

    def _is_verb(self, token: str) -> bool:
        return token in _COPULAS or token in self._detection

    def _reaches_back(self, cue: _Cue, start: int, end: int) -> bool:
        """Whether a cue behind a mention speaks of it, and not only of a later one in the same clause."""
        between = self.tokens[end : cue.start]
        if self.tokens[cue.start] == "?":  # "nodule (metastasis?)": the doubt is the bracket's
            return not any(token in _BREAKS for token in between)
        if "(" in between and ")" not in between:
            return False
        while between and between[-1] in _AUXILIARIES:
            between = between[:-1]
        if any(self._is_verb(token) for token in between):
            return False
        parted = "," in between or "and" in between
        return not (parted and any(self._is_verb(token) for token in self._same_clause(start)))

    def _same_clause(self, start: int) -> list[str]:
        ends = [cue.end for cue in self._cues if cue.kind == "scope_end" and cue.end <= start]
        return self.tokens[max(ends, default=0) : start]

    def _closed(self, start: int, end: int) -> bool:
        """Whether the scope of a cue that ends at `start` is over before the mention at `end`."""
        complete = False  # the cue's own statement has had its verb: "No nodule was detected, ..."
        for i in range(start, end):
            token = self.tokens[i]
            if token in self._detection:
                complete = True
            if token not in (",", "and", ")"):
                continue
            if self.tokens[i + 1 : i + 2] == [","] or (token == "," and self.tokens[i + 1 : i + 2] == ["and"]):
                continue
            rest = self.tokens[i + 1 :]
            segment = rest[: rest.index(",")] if "," in rest else rest
            if segment and segment[0] in self._own and (segment[0] == "there" or not {"or", "nor"} & set(rest)):
                return True
            for word, following in zip(segment, [*segment[1:], ""]):
                if word in _COPULAS and following not in self._detection and following not in ("not", "also"):
                    return True
                if complete and word in self._detection:
                    return True
        return False


@functools.cache
def _cues() -> tuple[PhraseIndex[str], frozenset[str], frozenset[str]]:
    """The shipped cues: (index of phrases by kind, words of detection, words that open a statement of their own)."""
    raw: dict[str, Any] = yaml.safe_load(_CUES_FILE.read_text(encoding="utf-8"))
    detection = frozenset(stem(word) for word in raw.pop("detection"))
    own = frozenset(stem(word) for word in raw.pop("own_statement"))
    index: PhraseIndex[str] = PhraseIndex()
    for kind, phrases in raw.items():
        for phrase in phrases:
            index.add(phrase, kind)
    for word in detection:
        for prefix in ("not", "not been", "not be", "not clearly", "not definitely", "never", "no longer"):
            index.add(f"{prefix} {word}", "negation_after")
    return index, detection, own
