"""Entities of reports: spans against hand-marked sentences, and the words under them against the matcher's own."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from ctx_distill.text.entities import EntityFinder
from ctx_distill.text.extractor import Vocabulary, load_vocabulary, shipped_vocabularies
from ctx_distill.text.phrases import stem, word_spans, words

ALL = ("finding", "cue", "side", "size", "place")
MARK = re.compile(r"\{(\w+):([^{}]*)\}")


def marked(text: str) -> tuple[str, list[tuple[str, str, int]]]:
    """A text without its marks "{kind:words}", and (kind, words, first character) of each."""
    plain, spans, behind = "", [], 0
    for match in MARK.finditer(text):
        plain += text[behind : match.start()]
        spans.append((match[1], match[2], len(plain)))
        plain += match[2]
        behind = match.end()
    return plain + text[behind:], spans


@pytest.mark.parametrize(
    "text",
    [
        "{cue:No} {finding:pleural effusion}.",
        "{finding:PLEURAL EFFUSIONS} are seen; {cue:no} {finding:pericardial effusion}.",
        "The {finding:heart is enlarged}.",
        "A {finding:PICC} ends in the superior vena cava.",  # an abbreviation
        "{finding:GGO} in the lingula.",
        "{cue:Possible} {finding:atelectasis}, {finding:pericardial effusion} {cue:cannot be excluded}.",
        "{finding:Atelectasis} was {cue:not seen}. {cue:Without} {finding:consolidation}.",
        "The examination does{cue:n't show} {finding:bronchiectasis}.",
        "The examination does {cue:not show} {finding:bronchiectasis}.",
        "Is it {finding:consolidation}{cue:?}",
        "Findings:\n1. {finding:Pleural\neffusion} on the left.\n2. {cue:No}   {finding:pleural   effusion} on the right.",
        "  {cue:No}  {finding:consolidation} .  \n\n{finding:Emphysema}.",
        "The spine is straight, but the chair is not.",
        "",
    ],
)
def test_findings_and_cues_are_where_a_reader_marks_them(text: str) -> None:
    plain, expected = marked(text)
    found = EntityFinder(load_vocabulary("ct-rate")).spans(plain)
    assert [(span.kind, plain[span.start : span.end], span.start) for span in found] == expected


def test_names_and_attributes() -> None:
    plain, expected = marked(
        "{size:Small} {side:left} {finding:pleural effusion}, {cue:no} {finding:nodule}; {size:8.5 mm} {finding:GGO} in the "
        "{side:right} {place:upper lobe}."
    )
    found = EntityFinder(load_vocabulary("ct-rate"), ALL).spans(plain)
    assert [(span.kind, plain[span.start : span.end], span.start) for span in found] == expected
    assert [span.name for span in found if span.kind == "finding"] == [
        "Pleural effusion",
        "Lung nodule",
        "Lung opacity",
    ]
    assert {span.kind for span in EntityFinder(load_vocabulary("ct-rate"), ("side",)).spans(plain)} == {"side"}
    assert EntityFinder(load_vocabulary("ct-rate"), ()).spans(plain) == []


def test_phrases_that_overlap_are_one_entity_by_the_finding_s_name() -> None:
    plain, expected = marked("{finding:No acute cardiopulmonary process}.")
    found = EntityFinder(load_vocabulary("chexpert")).spans(plain)
    assert [(span.kind, plain[span.start : span.end], span.start) for span in found] == expected
    assert found[0].name == "No Finding"


def test_a_normal_phrase_is_an_entity() -> None:
    plain, expected = marked("{finding:The pleural spaces are clear}. {finding:Lungs are clear}.")
    found = EntityFinder(load_vocabulary("phantom")).spans(plain)
    assert [(span.kind, plain[span.start : span.end], span.start) for span in found] == expected


def test_every_mention_that_extraction_reads_is_an_entity(cohort: Path) -> None:
    import pandas as pd

    from ctx_distill.text.extractor import extract

    vocabulary = load_vocabulary("phantom")
    finder = EntityFinder(vocabulary)
    for report in pd.read_csv(cohort / "ct.csv")["findings"].dropna():
        assert set(extract(report, vocabulary)) <= {span.name for span in finder.spans(report)} | _shared(vocabulary)
        spans = finder.spans(report)
        assert spans == finder.spans(report)
        assert all(a.end <= b.start for a, b in itertools.pairwise(spans))


def _shared(vocabulary: Vocabulary) -> set[str]:
    """Findings that share a phrase with another one, which then stands as one entity under one name."""
    phrases = [(f.name, phrase) for f in vocabulary.findings for phrase in (*f.normal, *f.synonyms)]
    return {name for name, phrase in phrases if any(p == phrase and n != name for n, p in phrases)}


@pytest.mark.parametrize(
    "text",
    [
        "It isn't 8.5 mm, isn’t it? (no)",
        "İn doesn't can't SS: İİ n't x",
        "don't",
        "",
        "Straße; nodules-masses/opacities",
    ],
)
def test_words_stand_where_their_spans_say(text: str) -> None:
    spans = word_spans(text)
    plain = [re.sub("n['’]t", "not", "".join(c.lower()[0] for c in text[a:b])) for a, b in spans]
    assert [stem(word) for word in plain] == words(text)


def test_attributes_are_no_vocabulary() -> None:
    assert "attributes" not in shipped_vocabularies()
