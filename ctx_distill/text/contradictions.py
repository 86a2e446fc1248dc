"""Find labels that contradict the text of their report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ctx_distill.errors import InputError
from ctx_distill.text.assertion import ABSENT, PRESENT


@dataclass(frozen=True)
class Contradiction:
    """A label that contradicts the text of its report.

    Attributes:
        place: position of the report, from 0.
        finding: name as in the vocabulary.
        label: 1 or 0.
        text: assertion of the report, 0 or 1, opposite to `label`.
    """

    place: int
    finding: str
    label: int
    text: int


@dataclass(frozen=True)
class Comparison:
    """The result of comparing labels with texts.

    Attributes:
        contradictions: labels of 1 denied in the text, and labels of 0 asserted there.
        compared: number of labels of 1 or 0 whose finding the text mentions, including contradictions.
        unmentioned: number of labels of 1 whose finding the text does not mention; not contradictions.
    """

    contradictions: tuple[Contradiction, ...]
    compared: int
    unmentioned: int


def compare(labels: Mapping[str, Sequence[float | None]], read: Sequence[Mapping[str, int]]) -> Comparison:
    """Compare labels with the findings extracted from the reports.

    Args:
        labels: N values per finding: 1, 0, -1 (uncertain), or None or NaN (blank). Uncertain and blank are ignored.
        read: assertions by finding for each of N reports, from `extract`.

    Raises:
        ValueError: the length of a column differs from that of `read`.
    """
    contradictions: list[Contradiction] = []
    compared = unmentioned = 0
    for finding, values in labels.items():
        for place, (label, report) in enumerate(zip(values, read, strict=True)):
            if label not in (PRESENT, ABSENT):
                continue
            text = report.get(finding)
            unmentioned += label == PRESENT and text is None
            if text in (PRESENT, ABSENT):
                compared += 1
                if text != label:
                    contradictions.append(Contradiction(place, finding, int(label), text))
    return Comparison(tuple(sorted(contradictions, key=lambda c: c.place)), compared, unmentioned)


def label_value(where: str, text: str) -> float | None:
    """Parse a cell of a label column: "1", "0.0", "-1" or blank ("", "nan").

    Args:
        where: file, row and column, for the message.
        text: content of the cell.

    Raises:
        InputError: any other content.
    """
    cell = text.strip()
    if cell.lower() in ("", "nan"):
        return None
    try:
        value = float(cell)
    except ValueError:
        value = float("inf")
    if value not in (PRESENT, ABSENT, -1):
        raise InputError(
            f"{where}: found {cell[:40]!r}; expected a label (1, 0, -1 or blank), correct or rename the column"
        )
    return value
