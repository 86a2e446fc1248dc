"""Determine the side (left, right or both) of a mention in a sentence."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from ctx_distill.text.assertion import Sentence
from ctx_distill.text.phrases import PhraseIndex, words

_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("left", "left sided", "left side", "left hemithorax", "lingula", "lingular"),
    "right": ("right", "right sided", "right side", "right hemithorax", "middle lobe"),
    "both": (
        "both", "bilateral", "bilaterally", "both sides", "each lung", "right and left", "left and right", "bibasilar",
        "bibasal", "biapical", "bihilar",
    ),
}  # fmt: skip
# Sides of structures other than lung, pleura and chest wall.
_NO_SIDE = (
    "left ventricle", "right ventricle", "left ventricular", "right ventricular", "left atrium", "right atrium",
    "left atrial", "right atrial", "left heart", "right heart", "left facing", "right facing", "left anterior descending",
    "left coronary", "right coronary", "left main coronary", "left lobe of the liver", "right lobe of the liver",
)  # fmt: skip
_JOINTS = frozenset([",", "and", "with", "or", "by", "without", "no"])


def side_of(sentence: Sentence, start: int, end: int, others: Sequence[tuple[int, int]]) -> str:
    """Return the side of the mention tokens[start:end].

    Side words between the mention and its neighbours count ("left effusion and right pneumothorax"), divided at a joint (a
    comma, "and", "with"). If there are none, side words of the complete clause count ("in the left lung, effusion and
    atelectasis are seen").

    Args:
        sentence: the sentence.
        start: first word of the mention.
        end: one past its last word.
        others: positions of the sentence's other mentions.

    Returns:
        "left", "right", "both", or "" if no side is mentioned.
    """
    side_words = _side_words(sentence)
    if not side_words:
        return ""
    low, high = sentence.clause(start, end)
    first = max((e for _, e in others if low < e <= start), default=low)
    last = min((s for s, _ in others if end <= s < high), default=high)
    if first > low:
        first = next((i for i in range(first, start) if sentence.tokens[i] in _JOINTS), first)
    if last < high:
        last = next((i for i in range(last - 1, end - 1, -1) if sentence.tokens[i] in _JOINTS), last)
    return _sum(side for place, side in side_words if first <= place < last) or _sum(
        side for place, side in side_words if low <= place < high
    )


def joined(sides: Sequence[str]) -> str:
    """Combine the sides of several mentions."""
    return _sum(side for side in sides if side)


def _side_words(sentence: Sentence) -> list[tuple[int, str]]:
    if _first_words().isdisjoint(sentence.tokens):
        return []
    return [(place, side) for place, _, _, side in _index().find(sentence.tokens)]


def _sum(sides: Iterable[str]) -> str:
    names = set(sides)
    if "both" in names or {"left", "right"} <= names:
        return "both"
    return str(next(iter(names), ""))


@functools.cache
def _first_words() -> frozenset[str]:
    return frozenset(words(phrase)[0] for phrases in _WORDS.values() for phrase in phrases)


@functools.cache
def _index() -> PhraseIndex[str]:
    index: PhraseIndex[str] = PhraseIndex()
    for side, phrases in _WORDS.items():
        for phrase in phrases:
            index.add(phrase, side)
    for phrase in _NO_SIDE:
        index.add(phrase, None)
    return index
