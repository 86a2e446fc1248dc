"""A vocabulary: findings, the phrases that speak of them, and the places that decide which finding a phrase is of."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctx_distill.text.assertion import ABSENT, PRESENT, Sentence
from ctx_distill.text.phrases import PhraseIndex
from ctx_distill.text.sides import side_of

_SENTENCE_CACHE = 262_144
"""Sentences that a vocabulary remembers, with what they say: about 100 MB."""
_UNPAIRED = frozenset(["heart", "pericardium", "vessels", "diaphragm", "mediastinum", "whole chest"])


@dataclass(frozen=True)
class Located:
    """Terms that mean a finding in some places and not in others: a calcification of the aorta, and of a valve.

    The places are looked for in the term's clause, first beside and behind the term, then before it.

    Attributes:
        terms: phrases, as `Finding.synonyms`.
        sites: places in whose company a term is the finding.
        elsewhere: places in whose company, where none of `sites` stands there, it is not.
        against: words in whose company, in the clause, it is not, whatever else stands there.
        required: whether a term that stands without any place is none either.
    """

    terms: tuple[str, ...]
    sites: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    required: bool = False


@dataclass(frozen=True)
class Finding:
    """One finding of a vocabulary.

    Attributes:
        name: as the label columns spell it.
        synonyms: phrases that mention it. Without case, plurals tolerated; "..." stands for up to eight words.
        normal: phrases that assert its absence ("the pleural spaces are clear").
        exclude: phrases that hold a synonym and mean something else ("subcutaneous edema").
        region: where it lies; None where not given.
        visible_on_xray: whether a radiograph shows it; None where not given.
        denied: phrases whose denial denies the finding and whose presence does not assert it ("infiltrative lesion").
        located: terms that need a place.
        contrary: phrases whose assertion, or doubt, takes the finding away, so that it means "nothing of these" ("No Finding").
        supporting: phrases that, asserted, speak for such a finding as its own synonyms do ("the lungs are clear"); so does the
            denial of a contrary phrase.
    """

    name: str
    synonyms: tuple[str, ...]
    normal: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    region: str | None = None
    visible_on_xray: bool | None = None
    denied: tuple[str, ...] = ()
    located: tuple[Located, ...] = ()
    contrary: tuple[str, ...] = ()
    supporting: tuple[str, ...] = ()


_Place = Literal["site", "elsewhere", "against"]


class Reading(NamedTuple):
    """What a sentence says of a finding: its number in the vocabulary, the assertion, "left", "right", "both" or ""."""

    number: int
    assertion: int
    side: str


class _Phrase(NamedTuple):
    number: int
    kind: Literal["synonym", "normal", "denied", "contrary", "supporting"]
    rule: tuple[int, int] | None = None
    required: bool = False


class _Match(NamedTuple):
    start: int
    end: int
    phrase: _Phrase


@dataclass(frozen=True)
class Vocabulary:
    """Findings to look for, in the order of the columns that `extract_many` gives.

    Attributes:
        name: of the vocabulary.
        findings: at least one, with distinct names.
        masks: phrases of findings that are not asked for; they hide what they contain ("pericardial effusion" hides
            "effusion"), so that a part of a vocabulary reads a report as the whole does.
    """

    name: str
    findings: tuple[Finding, ...]
    masks: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The findings' names, in order."""
        return [finding.name for finding in self.findings]

    @property
    def visible_on_xray(self) -> NDArray[np.bool_]:
        """(F,): which findings a radiograph shows; one of which nothing is said counts as shown."""
        return np.array([finding.visible_on_xray is not False for finding in self.findings], dtype=bool)

    @functools.cached_property
    def _index(self) -> PhraseIndex[_Phrase]:
        index: PhraseIndex[_Phrase] = PhraseIndex()
        for number, finding in enumerate(self.findings):
            for phrase in finding.synonyms:
                index.add(phrase, _Phrase(number, "synonym"))
            for phrase in finding.normal:
                index.add(phrase, _Phrase(number, "normal"))
            for phrase in finding.denied:
                index.add(phrase, _Phrase(number, "denied"))
            for phrase in finding.contrary:
                index.add(phrase, _Phrase(number, "contrary"))
            for phrase in finding.supporting:
                index.add(phrase, _Phrase(number, "supporting"))
            for i, rule in enumerate(finding.located):
                for phrase in rule.terms:
                    index.add(phrase, _Phrase(number, "synonym", (number, i), rule.required))
            for phrase in finding.exclude:
                index.add(phrase, None)
        for phrase in self.masks:
            index.add(phrase, None)
        return index

    @functools.cached_property
    def rest(self) -> frozenset[int]:
        """Numbers of the findings that mean "nothing of these": those with `contrary` phrases."""
        return frozenset(i for i, finding in enumerate(self.findings) if finding.contrary)

    @functools.cached_property
    def _places(self) -> PhraseIndex[tuple[int, int, _Place]]:
        """Places with the rule (finding, number) and what they are to it."""
        index: PhraseIndex[tuple[int, int, _Place]] = PhraseIndex()
        for number, finding in enumerate(self.findings):
            for i, rule in enumerate(finding.located):
                kinds: tuple[tuple[_Place, tuple[str, ...]], ...] = (
                    ("site", rule.sites), ("elsewhere", rule.elsewhere), ("against", rule.against)
                )  # fmt: skip
                for kind, phrases in kinds:
                    for phrase in phrases:
                        index.add(phrase, (number, i, kind))
        return index

    @functools.cached_property
    def _sentences(self) -> dict[str, tuple[Reading, ...]]:
        return {}

    def _matches(self, parsed: Sentence) -> Iterator[_Match]:
        places: list[tuple[int, tuple[int, int, _Place]]] | None = None
        for start, end, gapped, phrase in self._index.find(parsed.tokens):
            if gapped and parsed.interrupted(start, end):
                continue
            if phrase.rule is not None:
                if places is None:
                    places = [(place, payload) for place, _, _, payload in self._places.find(parsed.tokens)]
                near: dict[_Place, list[int]] = {"site": [], "elsewhere": [], "against": []}
                for place, (*rule, kind) in places:
                    if rule == [*phrase.rule]:
                        near[kind].append(place)
                if not _is_there(parsed, start, end, near, phrase.required):
                    continue
            yield _Match(start, end, phrase)

    def mentions(self, sentence: Sentence) -> list[tuple[int, int, str]]:
        """Mentions in a sentence, whatever is said of them, as (first word, one behind the last word, finding).

        All phrases but excluded ones, by place; a phrase with gaps reaches from its first word to its last one.
        """
        return [
            (match.start, match.end, self.findings[match.phrase.number].name)
            for match in self._matches(sentence)
            if match.phrase.kind not in ("contrary", "supporting")
        ]

    def read(self, sentence: str) -> tuple[Reading, ...]:
        """What a sentence says, mention by mention; remembered, since reports repeat."""
        known = self._sentences.get(sentence)
        if known is not None:
            return known
        parsed = Sentence(sentence)
        matches = list(self._matches(parsed))
        result = []
        for match in matches:
            number, kind, _, _ = match.phrase
            assertion = parsed.assertion(match.start, match.end)
            if kind == "contrary" and assertion is not None:
                result.append(Reading(number, PRESENT if assertion == ABSENT else ABSENT, ""))
            elif kind == "supporting" and assertion == PRESENT:
                result.append(Reading(number, PRESENT, ""))
            elif kind == "synonym" and number in self.rest:
                if assertion == PRESENT:  # "no effusion, no finding ..." denies nothing by its second half
                    result.append(Reading(number, PRESENT, ""))
            elif kind == "synonym" and assertion is not None:
                side = ""
                if assertion == PRESENT and self.findings[number].region not in _UNPAIRED:
                    others = [
                        (m.start, m.end)
                        for m in matches
                        if m.phrase.kind not in ("contrary", "supporting")
                        and (m.start >= match.end or m.end <= match.start)
                    ]
                    side = side_of(parsed, match.start, match.end, others)
                result.append(Reading(number, assertion, side))
            elif (kind == "denied" and assertion == ABSENT) or (kind == "normal" and assertion == PRESENT):
                result.append(Reading(number, ABSENT, ""))
        if len(self._sentences) >= _SENTENCE_CACHE:
            self._sentences.clear()
        self._sentences[sentence] = tuple(result)
        return self._sentences[sentence]


def _is_there(parsed: Sentence, start: int, end: int, places: dict[_Place, list[int]], required: bool) -> bool:
    """Whether the term tokens[start:end] means the finding; `places` are the first words of its rule's places."""
    low, high = parsed.clause(start, end)
    begin, behind = parsed.enumeration(start, end)
    near, far = range(begin, behind), range(low, high)
    if any(i in far for i in places["against"]):
        return False
    if any(i in near for i in places["site"]):
        return True
    if any(i in near for i in places["elsewhere"]):
        return False
    if any(i in far for i in places["site"]):
        return True
    return not required and not (parsed.is_prose(low, high) and any(i in far for i in places["elsewhere"]))
