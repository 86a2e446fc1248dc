"""Labels that a report's text contradicts: listed, so that nobody follows either of them blindly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ctx_distill.errors import InputError
from ctx_distill.text.assertion import ABSENT, PRESENT


@dataclass(frozen=True)
class Contradiction:
    """A label against the text of its report.

    Attributes:
        place: of the report, from 0.
        finding: as the vocabulary spells it.
        label: 1 or 0.
        text: what the report asserts, 0 or 1, never the same as `label`.
    """

    place: int
    finding: str
    label: int
    text: int


@dataclass(frozen=True)
class Comparison:
    """What came of comparing labels with texts.

    Attributes:
        contradictions: label 1 and denied in the text, or label 0 and asserted there.
        compared: labels of 1 or 0 of reports whose text speaks of the finding, the contradictions included.
        unmentioned: labels of 1 whose finding the text does not speak of; silence contradicts nothing.
    """

    contradictions: tuple[Contradiction, ...]
    compared: int
    unmentioned: int


def compare(labels: Mapping[str, Sequence[float | None]], read: Sequence[Mapping[str, int]]) -> Comparison:
    """Compare labels with what was read from the reports.

    Args:
        labels: finding -> N values: 1, 0, -1 (uncertain), or None or NaN (blank); the last two contradict nothing.
        read: of N reports, finding -> assertion, as `extract` gives it.

    Raises:
        ValueError: columns of another length than `read`.
    """
    found: list[Contradiction] = []
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
                    found.append(Contradiction(place, finding, int(label), text))
    return Comparison(tuple(sorted(found, key=lambda c: c.place)), compared, unmentioned)


def label_value(where: str, text: str) -> float | None:
    """A cell of a label column: "1", "0.0", "-1" or blank ("", "nan").

    Args:
        where: file, row and column, for the message.
        text: the cell.

    Raises:
        InputError: anything else.
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
            f"{where}: found {cell[:40]!r}, expected a label: 1, 0, -1 or blank; correct or rename the column"
        )
    return value
