"""Clinical entities of a report and where they stand: findings of a vocabulary, assertion cues, sides, sizes, places.

The matcher is the project's own (`text.findings`, `text.assertion`), so that what is masked is what labels, retrieval
and false negatives read, and one YAML that a radiologist edits rules them all. The maintained clinical libraries were
looked at first: no release of medSpaCy installs from wheels alone on Python 3.11 (1.0.0 needs leveldb, which has none;
those after it are sources), and negspaCy 1.1.0, which brings spaCy and 21 packages more, is NegEx alone: it takes its
entities from elsewhere, so this vocabulary would still have to find them.
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
        kind: what it is.
        name: the finding; of the other kinds, the kind again.
    """

    start: int
    end: int
    kind: EntityKind
    name: str


class EntityFinder:
    """Entities of texts, by a vocabulary."""

    def __init__(self, vocabulary: Vocabulary, kinds: Sequence[EntityKind] = ("finding", "cue")) -> None:
        """Args: vocabulary: the findings. kinds: what counts as an entity."""
        self.vocabulary = vocabulary
        self.kinds = tuple(kinds)
        self._known: dict[str, tuple[EntitySpan, ...]] = {}

    def spans(self, text: str) -> list[EntitySpan]:
        """Entities of a text, in order, without overlap.

        Findings count whatever is said of them, and so do phrases that assert an absence ("the lungs are clear").
        Entities that overlap are one, with the name of the first; a finding's name goes before a cue's, a cue's
        before an attribute's.

        Args:
            text: a report, in one line or in many.
        """
        found: list[EntitySpan] = []
        plain = text.replace("“", '"').replace("”", '"')  # as `split_sentences` writes them
        behind = 0
        for sentence in split_sentences(text):
            start = plain.find(sentence, behind)
            if start >= 0:
                behind = start + len(sentence)
                found += [EntitySpan(start + e.start, start + e.end, e.kind, e.name) for e in self._read(sentence)]
                continue
            # a line break or a run of spaces lies inside the sentence
            place = re.compile(r"\s+".join(map(re.escape, sentence.split()))).search(plain, behind)
            if place is not None:
                behind = place.end()
                found += self._locate(Sentence(sentence), word_spans(place.group()), place.start())
        return found

    def _read(self, sentence: str) -> tuple[EntitySpan, ...]:
        """Entities of a sentence; remembered, since reports repeat."""
        known = self._known.get(sentence)
        if known is None:
            if len(self._known) >= _CACHE:
                self._known.clear()
            known = self._known[sentence] = tuple(self._locate(Sentence(sentence), word_spans(sentence), 0))
        return known

    def _locate(self, sentence: Sentence, places: Sequence[tuple[int, int]], shift: int) -> list[EntitySpan]:
        """Entities of a sentence whose words stand at `places`, moved by `shift` characters."""
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
    """Matches in order, overlapping ones as one; of equals, the name of the one that was given first."""
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
    """Sides, sizes and places among the words of a sentence."""
    found = [(start, end, kind, str(kind)) for start, end, _, kind in _attribute_index().find(tokens)]
    for i, (token, unit) in enumerate(itertools.pairwise(tokens)):
        if token[0].isdigit() and unit in _LENGTH_UNITS:
            found.append((i, i + 2, "size", "size"))
    return found


@functools.cache
def _attribute_index() -> PhraseIndex[EntityKind]:
    raw: dict[EntityKind, Any] = yaml.safe_load(_ATTRIBUTES_FILE.read_text(encoding="utf-8"))
    index: PhraseIndex[EntityKind] = PhraseIndex()
    for kind, phrases in raw.items():
        for phrase in phrases:
            index.add(phrase, kind)
    return index
