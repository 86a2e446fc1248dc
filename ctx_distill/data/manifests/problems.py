"""Collect the problems of one input, so that a message shows up to ten at once instead of only the first."""

from __future__ import annotations

from pathlib import Path

from ctx_distill.errors import InputError

SHOWN = 10


def shorten(value: object, limit: int = 80) -> str:
    """Return `repr` of a value, truncated in case it is a report."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 4] + "..." + text[-1]


class Problems:
    """The problems of one file: the first `SHOWN` as text, and their total number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._shown: list[tuple[int, str]] = []

    def add(self, row: int, column: str, found: str, remedy: str) -> None:
        """Add one problem.

        Args:
            row: row number in the file, as shown to users.
            column: column name.
            found: description of the value.
            remedy: what was expected and what to do.
        """
        self.count += 1
        if len(self._shown) < SHOWN:
            self._shown.append((row, f"row {row}, column {column!r}: found {found}; {remedy}"))

    def raise_if_any(self) -> None:
        """Raise an `InputError` that lists the problems in the order of the rows, if there are any."""
        if not self.count:
            return
        lines = [text for _, text in sorted(self._shown, key=lambda item: item[0])]
        if self.count == 1:
            raise InputError(f"{self.path}: {lines[0]}")
        head = f"{self.path}: {self.count} problems"
        head += f", of which the first {SHOWN} are:" if self.count > SHOWN else ":"
        raise InputError("\n".join([head, *(f"  {line}" for line in lines)]))
