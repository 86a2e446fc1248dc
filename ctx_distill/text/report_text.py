"""Reports as text: sections, sentences, random subsets of sentences, chunks that a text tower can read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

NO_TEXT = frozenset({"", "not given", "not given.", "nan", "none", "n/a"})
"""What stands in place of a text that was not given (lower case)."""
_ABBREVIATION = re.compile(
    r"dr|mr|mrs|ms|prof|st|vs|cf|approx|figs?|e\.g|i\.e|a\.m|p\.m|resp|incl|diam|max|etc|ser|im|img"
)
_UNIT = re.compile(r"mm|cm|ml|cc|mg|m|kg|hu|sec|min")
_BULLET = re.compile(r"^(?:[-*•·–]+|\(?\d{1,2}[.)])\s+")
_LIST_NUMBER = re.compile(r"(?<![Nn]o\.\s)(?:(?<=[.;:!?]\s)|^)\(?\d{1,2}[.)]\s+(?=[^\W\d_])")
# CT-RATE parts the items of an impression by stray quote marks; a quoted word ("tree-in-bud") parts nothing
_INLINE_MARK = re.compile(r"""\s*[•·]\s*|\s*"{2,}\s*|(?<=[.!?])\s*"\s*|\s"\s(?=[A-Z0-9])|^"\s*|\s*"$""")
_DIGIT_MARK = re.compile(r"\d[.)]\s")
"""What every match of `_LIST_NUMBER` holds."""
_MARK = re.compile(r"[•·\"]")
"""What every match of `_INLINE_MARK` ends with, save for the space behind it."""
_SHORT = 8
_END = re.compile(r"[.!?]+[)\]'’]*(?=\s+\S)")
_LONGEST = 300
_WRAPPED = 60
"""A line at least this long that ends without punctuation was wrapped by a machine, so the sentence goes on."""


class UniformSource(Protocol):
    """What `sample_sentences` draws from: `random.Random` and `numpy.random.Generator` both fit."""

    def random(self) -> float:
        """A number in [0, 1)."""
        ...


def _lines(text: str) -> list[str]:
    """Physical lines joined where a line break lies inside a sentence, parted at list marks and empty lines."""
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
    """Whether `mark` at the end of the words piece[start:end] closes a sentence that the character `after` does not go on with.

    The words are parted by single spaces.
    """
    if after in ",;:)":
        return False
    if mark.startswith("."):
        tail = piece[max(start, end - _SHORT) : end]  # a longer word is no abbreviation and no unit
        word = tail[max(tail.rfind(" "), tail.rfind("("), tail.rfind("[")) + 1 :].lower()
        if _ABBREVIATION.fullmatch(word) or (word == "no" and after.isdigit()):
            return False
        if after.islower() and (_UNIT.fullmatch(word) or len(word) == 1):
            return False
    elif mark.startswith("?") and after.islower():
        return False
    return True


def _items(line: str) -> list[str]:
    """What `_INLINE_MARK.split` gives, looked for at quote marks and bullets alone: they are rare, and a search is slow."""
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
    """Sentences of a report, in order, without list marks and without empty ones.

    Decimal points, units with a period ("5 mm. in diameter"), abbreviations, numbered and bulleted lists, lines
    wrapped by a machine, and the quote marks that CT-RATE puts between the items of an impression are understood.

    Args:
        text: a report or a section of one; may be empty.

    Returns:
        Sentences with single spaces and their own end marks.
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
                    # the pattern looks ahead to the space that parts two words, so that a character stands behind it
                    if _ends_here(piece, start, match.start(), match.group(), piece[end + 1]):
                        sentences.append(piece[start:end].strip())
                        start = end
                sentences.append(piece[start:].strip())
    return [s for s in sentences if s[:1].isalnum() or any(c.isalnum() for c in s)]


def reading_pieces(text: str) -> Iterator[str]:
    """Sentences, those of more than 300 words in pieces: the time of reading one grows with its square."""
    for sentence in split_sentences(text):
        parts = sentence.split() if len(sentence) > _LONGEST else [sentence]
        if len(parts) > _LONGEST:
            yield from (" ".join(parts[i : i + _LONGEST]) for i in range(0, len(parts), _LONGEST))
        elif len(sentence) > 10 * _LONGEST:  # hardly a space: at marks
            marks = re.findall(r"\w+|\W", sentence)
            yield from ("".join(marks[i : i + 2 * _LONGEST]) for i in range(0, len(marks), 2 * _LONGEST))
        else:
            yield sentence


def _section(text: object) -> str:
    if not isinstance(text, str) or text.strip().lower() in NO_TEXT:  # a blank cell of pandas is NaN, a float
        return ""
    # by sentences, so that the items of a list stay apart when their line breaks go
    return " ".join(item if item.rstrip(")]'’")[-1:] in tuple(".!?") else item + "." for item in split_sentences(text))


def join_sections(findings: str | float | None, impression: str | float | None) -> str:
    """The report of a study: findings, then impression, sentence by sentence, each ended by a mark.

    Args:
        findings: the section's text; None, NaN, "" and CT-RATE's "Not given." mean that there is none.
        impression: likewise. An impression equal to the findings is not repeated.

    Returns:
        One string without line breaks and list marks, "" where both are missing; `split_sentences` parts it again
        into the sentences of its sections.
    """
    first, second = _section(findings), _section(impression)
    return first if first == second else " ".join(part for part in (first, second) if part)


def sample_sentences(text: str, rng: UniformSource, minimum: int = 1) -> str:
    """A random subset of a report's sentences in their order: the augmentation a text tower needs for short prompts.

    The size of the subset is `minimum` with probability 3/8, the whole report with probability 1/4, and otherwise
    uniform between the two; which sentences is uniform. So single sentences are frequent, and with them prompts such
    as "Pleural effusion is present." look like what the tower was trained on (see stack-facts: towers trained on
    whole reports only did badly on one-sentence prompts).

    Args:
        text: a report; returned as it is (with single spaces) where it has no more than `minimum` sentences.
        rng: `random.Random` or `numpy.random.Generator`; only its `random()` is used.
        minimum: smallest number of sentences, at least 1.

    Raises:
        ValueError: `minimum` below 1.
    """
    if minimum < 1:
        raise ValueError(f"sample_sentences: minimum is {minimum}, expected 1 or more.")
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
    low, high = 1, len(words)  # one word is always taken, or packing would not end
    while low < high:
        middle = (low + high + 1) // 2
        if fits(" ".join(words[:middle])):
            low = middle
        else:
            high = middle - 1
    return low


def pack_chunks(sentences: Sequence[str], fits: Callable[[str], bool]) -> list[str]:
    """Packs sentences greedily, in order, into as few chunks as fit a text tower's context.

    Args:
        sentences: as `split_sentences` gives them.
        fits: whether a text fits (for example: its token count is at most the context length).

    Returns:
        Chunks that each fit. A sentence that does not fit alone is broken between words; a single word that does not
        fit is a chunk by itself, for the tokenizer to truncate.
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
