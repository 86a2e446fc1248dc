"""Split text into words and find phrases in them.

Phrases are matched by word in nested dictionaries of stemmed words. This processes thousands of short reports per second,
independent of the size of the vocabulary.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_TOKEN = re.compile(r"[^\W_]+(?:\.\d+)?|[,;:?()]")
_CONTRACTED = re.compile("n['’]t")
_GAP = "..."
_GAP_WORDS = 8
BREAKS = frozenset(",;:?()")
"""Punctuation that `words` keeps."""


@functools.lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """Return a word without its plural ending: nodules -> nodule, opacities -> opacity, masses -> mass, stenosis unchanged."""
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("sses", "ches", "shes", "xes")):
        return word[:-2]
    return word[:-1]


def _lower(text: str) -> str:
    lowered = text.lower()
    # a few capitals ("İ") have two-character lower case, which would shift positions in the text
    return lowered if len(lowered) == len(text) else "".join(c.lower()[0] for c in text)


def words(text: str) -> list[str]:
    """Return stemmed lower-case words and the marks , ; : ? ( ); hyphens, slashes and periods separate words."""
    return [stem(word) for word in _TOKEN.findall(_CONTRACTED.sub(" not", _lower(text)))]


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return the character span (start, end) of each of `words(text)`; "n't" is the span of "not"."""
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
    """Find phrases with payloads in a list of words: the longest at each position, left to right, without overlap.

    A phrase may contain gaps, written "...", of up to eight words without punctuation ("heart ... normal"). Phrases with
    gaps are matches independently of the others.
    """

    def __init__(self) -> None:
        self._root: _Node[T] = _Node()
        self._gapped: dict[str, list[tuple[list[list[str]], T]]] = {}
        self._first: set[str] = set()

    def add(self, phrase: str, payload: T | None) -> None:
        """Add a phrase; a phrase without a payload only hides the shorter phrases within it."""
        parts = [words(part) for part in phrase.split(_GAP)]
        if not all(parts):
            raise ValueError(f"the phrase {phrase!r} has no word, or nothing before or after '...'")
        self._first.add(parts[0][0])
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
        """Return matches as (first word, one past the last word, whether the phrase has gaps, payload), in order."""
        matches: list[tuple[int, int, bool, T]] = []
        free_from, total = 0, len(tokens)
        gapped, begins, first = self._gapped, self._root.children, self._first
        for i in [i for i, token in enumerate(tokens) if token in first]:
            token = tokens[i]
            if token in gapped:
                for parts, payload in gapped[token]:
                    end = _match_gapped(tokens, i, parts)
                    if end:
                        matches.append((i, end, True, payload))
            node = begins.get(token)
            if i < free_from or node is None:
                continue
            best: _Node[T] | None = None
            j = i + 1
            while node is not None:
                if node.payloads or "" in node.children:
                    best, free_from = node, j
                node = node.children.get(tokens[j]) if j < total else None
                j += 1
            if best is not None:
                matches.extend((i, free_from, False, payload) for payload in best.payloads)
        return matches


def _match_gapped(tokens: Sequence[str], start: int, parts: list[list[str]]) -> int:
    """Return one past the last word of a gapped phrase that starts at `start`, or 0 if it does not match."""
    end = start + len(parts[0])
    if len(parts[0]) > 1 and list(tokens[start:end]) != parts[0]:
        return 0
    for part in parts[1:]:
        if part[0] not in tokens:
            return 0
        for skip in range(_GAP_WORDS + 1):
            at = end + skip
            if list(tokens[at : at + len(part)]) == part:
                end = at + len(part)
                break
            if at >= len(tokens) or tokens[at] in BREAKS:
                return 0
        else:
            return 0
    return end
