"""Sentences of our own with what a radiologist means by them, written before the extractor was run on them.

Those that are read wrongly have a table of their own, whose test fails as soon as one of them is read rightly: an expected failure
inside the first table would hide which they are.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ctx_distill.text.extractor import extract, extract_sides, load_vocabulary

VOCABULARIES = {"c": "ct-rate", "x": "chexpert"}


def table(name: str) -> list[tuple[str, str, str]]:
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    parted = [line.split(" | ") for line in lines if line and not line.startswith("#")]
    return [(vocabulary, text, expected) for vocabulary, text, expected in parted]


def wrong(vocabulary: str, text: str, expected: str) -> list[str]:
    known = load_vocabulary(VOCABULARIES[vocabulary])
    found, sides = extract(text, known), extract_sides(text, known)
    faults = []
    for one in expected.split(";"):
        name, _, told = one.strip().partition("=")
        assertion, *side = told.split()
        assert name in known.names
        if str(found.get(name, "-")) != assertion:
            faults.append(f"{name}: {found.get(name, '-')}, not {assertion}")
        if side and (sides.get(name) or ".") != side[0]:
            faults.append(f"{name}: side {sides.get(name)}, not {side[0]}")
    return faults


def test_the_tables_are_whole() -> None:
    sentences = [text for name in ("challenge.txt", "challenge_known.txt") for _, text, _ in table(name)]
    assert len(sentences) == len(set(sentences)) == 190


@pytest.mark.parametrize(("vocabulary", "text", "expected"), table("challenge.txt"))
def test_sentences_are_read_as_they_are_meant(vocabulary: str, text: str, expected: str) -> None:
    assert wrong(vocabulary, text, expected) == []


@pytest.mark.parametrize(("vocabulary", "text", "expected"), table("challenge_known.txt"))
def test_what_is_read_wrongly_is_known(vocabulary: str, text: str, expected: str) -> None:
    assert wrong(vocabulary, text, expected), "read rightly now: move the line to challenge.txt, and tell docs/text.md"
