"""Vocabularies: findings, the phrases that mention them, and the places that disambiguate phrases."""

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
"""Number of sentences whose result a vocabulary caches: about 100 MB."""
_UNPAIRED = frozenset(["heart", "pericardium", "vessels", "diaphragm", "mediastinum", "whole chest"])


@dataclass(frozen=True)
class Located:
    """Terms whose meaning depends on the place, such as a calcification of the aorta or of a valve.

    Places are searched in the term's clause, first next to and after the term, then before it.

    Attributes:
        terms: phrases, as `Finding.synonyms`.
        sites: places with which a term is the finding.
        elsewhere: places with which it is not, unless one of `sites` is there.
        against: words of the clause with which it is never the finding.
        required: whether a term without any place is not the finding either.
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
        name: name as in the label columns.
        synonyms: phrases that mention it, case-insensitive and with plurals; "..." matches up to eight words.
        normal: phrases that assert its absence ("the pleural spaces are clear").
        exclude: phrases that contain a synonym but mean something else ("subcutaneous edema").
        region: anatomical region, or None.
        visible_on_xray: whether a radiograph shows it, or None if unknown.
        denied: phrases whose negation negates the finding, but whose presence does not assert it ("infiltrative
            lesion").
        located: terms that need a place.
        contrary: phrases that rule out the finding if asserted or uncertain, so that it means "none of these" ("No
            Finding").
        supporting: phrases whose assertion supports such a finding like its synonyms ("the lungs are clear"), as does
            the negation of a contrary phrase.
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
    """A mention in a sentence: number of the finding, assertion, and side ("left", "right", "both" or "")."""

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
    """Findings to extract, in the order of the columns of `extract_many`.

    Attributes:
        name: name of the vocabulary.
        findings: at least one finding, with distinct names.
        masks: phrases of other findings, which hide what they contain ("pericardial effusion" hides "effusion"), so that
            a subset of a vocabulary gives the same results as the full vocabulary.
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
        """Whether a radiograph shows each finding, (F,) bool; unknown counts as true."""
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
        """The numbers of the findings that mean "none of these": those with `contrary` phrases."""
        return frozenset(i for i, finding in enumerate(self.findings) if finding.contrary)

    @functools.cached_property
    def _places(self) -> PhraseIndex[tuple[int, int, _Place]]:
        """The places with their rule (finding, number) and their role in it."""
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
        """Return the mentions in a sentence as (first word, one past the last word, finding), in order.

        Mentions of any assertion count, except excluded phrases; a gapped phrase spans its first to its last word.
        """
        return [
            (match.start, match.end, self.findings[match.phrase.number].name)
            for match in self._matches(sentence)
            if match.phrase.kind not in ("contrary", "supporting")
        ]

    def read(self, sentence: str) -> tuple[Reading, ...]:
        """Return the readings of a sentence by mention; cached, since sentences recur."""
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
                if assertion == PRESENT:  # the second half of "no effusion, no finding ..." negates nothing
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
    """Return whether the term tokens[start:end] means the finding; `places` has the first words of its places."""
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
