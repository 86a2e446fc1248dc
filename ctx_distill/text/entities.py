"""Locate clinical entities of a report: findings of a vocabulary, assertion cues, sides, sizes and places.

The matcher is shared with the extractor (`text.extractor`, `text.assertion`), so that masking, labels, retrieval and
false-negative detection use the same YAML vocabulary. Clinical libraries were considered: no release of medSpaCy installs
from wheels alone on Python 3.11, and negspaCy 1.1.0 (spaCy and 21 more packages) implements only NegEx, so entities would
still have to be entities with this vocabulary.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ctx_distill.text.assertion import Sentence
from ctx_distill.text.extractor import Vocabulary
from ctx_distill.text.phrases import PhraseIndex, word_spans
from ctx_distill.text.report_text import split_sentences

EntityKind = Literal["finding", "cue", "side", "size", "place"]

_ATTRIBUTES_FILE = Path(__file__).with_name("vocabularies") / "attributes.yaml"
_CUES = frozenset(["negation_before", "negation_after", "uncertain_before", "uncertain_after"])
_LENGTH_UNITS = ("mm", "cm")
_CACHE = 65536


@dataclass(frozen=True)
class EntitySpan:
    """An entity in a text.

    Attributes:
        start: first character.
        end: one past the last character.
        kind: kind of entity.
        name: name of the finding; for other kinds, the kind.
    """

    start: int
    end: int
    kind: EntityKind
    name: str


class EntityFinder:
    """Find entities in texts with a vocabulary."""

    def __init__(self, vocabulary: Vocabulary, kinds: Sequence[EntityKind] = ("finding", "cue")) -> None:
        """Create a finder.

        Args:
            vocabulary: the findings.
            kinds: kinds of entities to find.
        """
        self.vocabulary = vocabulary
        self.kinds = tuple(kinds)
        self._known: dict[str, tuple[EntitySpan, ...]] = {}

    def spans(self, text: str) -> list[EntitySpan]:
        """Return the entities of a text in order, without overlap.

        Findings count regardless of their assertion, as do phrases that assert an absence ("the lungs are clear").
        Overlapping entities are merged; names of findings take precedence over cues, cues over attributes, and earlier
        entities over later ones.

        Args:
            text: report, with or without line breaks.
        """
        entities: list[EntitySpan] = []
        plain = text.replace("“", '"').replace("”", '"')  # as in `split_sentences`
        behind = 0
        for sentence in split_sentences(text):
            start = plain.find(sentence, behind)
            if start >= 0:
                behind = start + len(sentence)
                entities += [EntitySpan(start + e.start, start + e.end, e.kind, e.name) for e in self._read(sentence)]
                continue
            # the sentence contains a line break or several spaces
            place = re.compile(r"\s+".join(map(re.escape, sentence.split()))).search(plain, behind)
            if place is not None:
                behind = place.end()
                entities += self._locate(Sentence(sentence), word_spans(place.group()), place.start())
        return entities

    def _read(self, sentence: str) -> tuple[EntitySpan, ...]:
        """Return the entities of a sentence; cached, since sentences recur."""
        known = self._known.get(sentence)
        if known is None:
            if len(self._known) >= _CACHE:
                self._known.clear()
            known = self._known[sentence] = tuple(self._locate(Sentence(sentence), word_spans(sentence), 0))
        return known

    def _locate(self, sentence: Sentence, places: Sequence[tuple[int, int]], shift: int) -> list[EntitySpan]:
        """Return the entities of a sentence whose words have the spans `places`, shifted by `shift` characters."""
        matches: list[tuple[int, int, EntityKind, str]] = []
        if "finding" in self.kinds:
            matches += [(start, end, "finding", name) for start, end, name in self.vocabulary.mentions(sentence)]
        if "cue" in self.kinds:
            matches += [(start, end, "cue", "cue") for start, end, kind in sentence.cues() if kind in _CUES]
        matches += [m for m in _attributes(sentence.tokens) if m[2] in self.kinds]
        return [
            EntitySpan(shift + places[start][0], shift + places[end - 1][1], kind, name)
            for start, end, kind, name in _joined(matches)
        ]


def _joined(matches: Iterable[tuple[int, int, EntityKind, str]]) -> list[tuple[int, int, EntityKind, str]]:
    """Sort matches and merge overlapping ones; ties take the name of the earlier one."""
    rank = {"finding": 0, "cue": 1}
    joined: list[tuple[int, int, EntityKind, str]] = []
    for match in sorted(matches, key=lambda m: m[0]):
        if joined and match[0] < joined[-1][1]:
            last = joined[-1]
            _, _, kind, name = min(last, match, key=lambda m: rank.get(m[2], 2))
            joined[-1] = (last[0], max(last[1], match[1]), kind, name)
        else:
            joined.append(match)
    return joined


def _attributes(tokens: Sequence[str]) -> list[tuple[int, int, EntityKind, str]]:
    """Return the sides, sizes and places in a sentence."""
    entities = [(start, end, kind, str(kind)) for start, end, _, kind in _attribute_index().find(tokens)]
    for i, (token, unit) in enumerate(itertools.pairwise(tokens)):
        if token[0].isdigit() and unit in _LENGTH_UNITS:
            entities.append((i, i + 2, "size", "size"))
    return entities


@functools.cache
def _attribute_index() -> PhraseIndex[EntityKind]:
    raw: dict[EntityKind, Any] = yaml.safe_load(_ATTRIBUTES_FILE.read_text(encoding="utf-8"))
    index: PhraseIndex[EntityKind] = PhraseIndex()
    for kind, phrases in raw.items():
        for phrase in phrases:
            index.add(phrase, kind)
    return index
