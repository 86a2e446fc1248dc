"""Split report texts into sections, sentences, random subsets of sentences, and chunks that fit a text tower."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

NO_TEXT = frozenset({"", "not given", "not given.", "nan", "none", "n/a"})
"""Placeholders for a missing text (lower case)."""
_ABBREVIATION = re.compile(
    r"dr|mr|mrs|ms|prof|st|vs|cf|approx|figs?|e\.g|i\.e|a\.m|p\.m|resp|incl|diam|max|etc|ser|im|img"
)
_UNIT = re.compile(r"mm|cm|ml|cc|mg|m|kg|hu|sec|min")
_BULLET = re.compile(r"^(?:[-*•·–]+|\(?\d{1,2}[.)])\s+")
_LIST_NUMBER = re.compile(r"(?<![Nn]o\.\s)(?:(?<=[.;:!?]\s)|^)\(?\d{1,2}[.)]\s+(?=[^\W\d_])")
# CT-RATE separates the items of an impression by stray quotation marks; a quoted word ("tree-in-bud") is kept
_INLINE_MARK = re.compile(r"""\s*[•·]\s*|\s*"{2,}\s*|(?<=[.!?])\s*"\s*|\s"\s(?=[A-Z0-9])|^"\s*|\s*"$""")
_DIGIT_MARK = re.compile(r"\d[.)]\s")
"""Part of every match of `_LIST_NUMBER`."""
_MARK = re.compile(r"[•·\"]")
"""End of every match of `_INLINE_MARK`, except trailing space."""
_SHORT = 8
_END = re.compile(r"[.!?]+[)\]'’]*(?=\s+\S)")
_LONGEST = 300
_WRAPPED = 60
"""A line of at least this length without final punctuation was wrapped, so its sentence continues."""


class UniformSource(Protocol):
    """Random source of `sample_sentences`, such as `random.Random` or `numpy.random.Generator`."""

    def random(self) -> float:
        """Return a number in [0, 1)."""
        ...


def _lines(text: str) -> list[str]:
    """Join lines that were wrapped within a sentence; split at list marks and empty lines."""
    parts: list[str] = []
    previous = ""
    for raw in text.splitlines():
        line = raw.strip()
        bulleted = _BULLET.match(line)
        wrapped = line[:1].islower() or (len(previous) >= _WRAPPED and previous[-1:] not in ".!?:;")
        if not line:
            pass
        elif parts and previous and not bulleted and wrapped:
            parts[-1] += " " + line
        else:
            parts.append(line[bulleted.end() :] if bulleted else line)
        previous = line
    return parts


def _ends_here(piece: str, start: int, end: int, mark: str, after: str) -> bool:
    """Return whether `mark` after piece[start:end] ends a sentence, given the next character `after`.

    The words are separated by single spaces.
    """
    if after in ",;:)":
        return False
    if mark.startswith("."):
        tail = piece[max(start, end - _SHORT) : end]  # a longer word is neither an abbreviation nor a unit
        word = tail[max(tail.rfind(" "), tail.rfind("("), tail.rfind("[")) + 1 :].lower()
        if _ABBREVIATION.fullmatch(word) or (word == "no" and after.isdigit()):
            return False
        if after.islower() and (_UNIT.fullmatch(word) or len(word) == 1):
            return False
    elif mark.startswith("?") and after.islower():
        return False
    return True


def _items(line: str) -> list[str]:
    """Return `_INLINE_MARK.split(line)`, searching only at quotation marks and bullets, which are rare."""
    items: list[str] = []
    done = 0
    for found in _MARK.finditer(line):
        mark = found.start()
        if mark < done:
            continue
        first = mark
        while first > done and line[first - 1].isspace():
            first -= 1
        for place in range(first, mark + 1):
            if match := _INLINE_MARK.match(line, place):
                items.append(line[done:place])
                done = match.end()
                break
    return [*items, line[done:]]


def split_sentences(text: str) -> list[str]:
    """Return the non-empty sentences of a report in order, without list marks.

    Handles decimal points, units with a period ("5 mm. in diameter"), abbreviations, numbered and bulleted lists, wrapped
    lines, and the quotation marks that CT-RATE puts between the items of an impression.

    Args:
        text: report or section; may be empty.

    Returns:
        Sentences with single spaces and their end marks.
    """
    sentences: list[str] = []
    for line in _lines(text):
        for item in _items(line.replace("“", '"').replace("”", '"')):
            rest = _LIST_NUMBER.sub("\n", item) if _DIGIT_MARK.search(item) else item
            for part in rest.split("\n"):
                piece = " ".join(part.split())
                start = 0
                for match in _END.finditer(piece):
                    end = match.end()
                    # the lookahead of the pattern guarantees a character after the space
                    if _ends_here(piece, start, match.start(), match.group(), piece[end + 1]):
                        sentences.append(piece[start:end].strip())
                        start = end
                sentences.append(piece[start:].strip())
    return [s for s in sentences if s[:1].isalnum() or any(c.isalnum() for c in s)]


def reading_pieces(text: str) -> Iterator[str]:
    """Yield sentences, split at 300 words because the time per sentence is quadratic in its length."""
    for sentence in split_sentences(text):
        parts = sentence.split() if len(sentence) > _LONGEST else [sentence]
        if len(parts) > _LONGEST:
            yield from (" ".join(parts[i : i + _LONGEST]) for i in range(0, len(parts), _LONGEST))
        elif len(sentence) > 10 * _LONGEST:  # few spaces: split at word boundaries
            marks = re.findall(r"\w+|\W", sentence)
            yield from ("".join(marks[i : i + 2 * _LONGEST]) for i in range(0, len(marks), 2 * _LONGEST))
        else:
            yield sentence


def _section(text: object) -> str:
    if not isinstance(text, str) or text.strip().lower() in NO_TEXT:  # pandas represents a blank cell as NaN
        return ""
    # by sentence, so that list items stay separate without their line breaks
    return " ".join(item if item.rstrip(")]'’")[-1:] in tuple(".!?") else item + "." for item in split_sentences(text))


def join_sections(findings: str | float | None, impression: str | float | None) -> str:
    """Join findings and impression into a report whose sentences all have an end mark.

    Args:
        findings: text of the section; None, NaN, "" and CT-RATE's "Not given." mean that it is missing.
        impression: likewise. An impression equal to the findings is not repeated.

    Returns:
        One string without line breaks and list marks, "" if both are missing; `split_sentences` recovers the
        sentences.
    """
    first, second = _section(findings), _section(impression)
    return first if first == second else " ".join(part for part in (first, second) if part)


def sample_sentences(text: str, rng: UniformSource, minimum: int = 1) -> str:
    """Return a random subset of a report's sentences in order, an augmentation for short prompts.

    The subset has `minimum` sentences with probability 3/8, all sentences with probability 1/4, and otherwise a uniform
    size in between; sentences are chosen uniformly. Single sentences are therefore frequent, so that prompts such as
    "Pleural effusion is present." resemble the training texts. Towers trained on complete reports alone performed badly
    on one-sentence prompts.

    Args:
        text: report; returned with single spaces if it has at most `minimum` sentences.
        rng: random source.
        minimum: min number of sentences, at least 1.

    Raises:
        ValueError: `minimum` below 1.
    """
    if minimum < 1:
        raise ValueError(f"sample_sentences: minimum is {minimum}; expected 1 or more")
    sentences = split_sentences(text)
    total = len(sentences)
    if total <= minimum:
        return " ".join(sentences)
    draw = rng.random()
    if draw < 0.375:
        size = minimum
    elif draw < 0.75:
        size = minimum + int(rng.random() * (total - minimum + 1))
    else:
        size = total
    keys = [rng.random() for _ in range(total)]
    chosen = sorted(sorted(range(total), key=keys.__getitem__)[:size])
    return " ".join(sentences[i] for i in chosen)


def _longest_prefix(words: Sequence[str], fits: Callable[[str], bool]) -> int:
    low, high = 1, len(words)  # take at least one word, so that packing terminates
    while low < high:
        middle = (low + high + 1) // 2
        if fits(" ".join(words[:middle])):
            low = middle
        else:
            high = middle - 1
    return low


def pack_chunks(sentences: Sequence[str], fits: Callable[[str], bool]) -> list[str]:
    """Pack sentences greedily and in order into few chunks that fit a text tower's context.

    Args:
        sentences: sentences from `split_sentences`.
        fits: whether a text fits (for example: its token count is at most the context length).

    Returns:
        Chunks that each fit. A sentence that does not fit is split between words; a single word that does not fit
        is its own chunk, which the tokenizer truncates.
    """
    chunks: list[str] = []
    current = ""
    for sentence in sentences:
        joined = f"{current} {sentence}" if current else sentence
        if fits(joined):
            current = joined
            continue
        if current:
            chunks.append(current)
        current = sentence
        while not fits(current):
            words = current.split()
            if len(words) < 2:
                break
            size = _longest_prefix(words, fits)
            if size == len(words):
                break
            chunks.append(" ".join(words[:size]))
            current = " ".join(words[size:])
    return [*chunks, current] if current else chunks
