"""Gathers the faults of one input, so that a user sees ten of them at once and not the first of a thousand."""

from __future__ import annotations

from pathlib import Path

from ctx_distill.errors import InputError

SHOWN = 10


def shorten(value: object, limit: int = 80) -> str:
    """`repr` of a value, cut so that a report text in the wrong column does not fill the screen."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 4] + "..." + text[-1]


class Problems:
    """The faults found so far in one file: the first `SHOWN` in words, the rest as a count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._shown: list[tuple[int, str]] = []

    def add(self, row: int, column: str, found: str, remedy: str) -> None:
        """Notes one fault.

        Args:
            row: the row as the user sees it in the file.
            column: the column's name.
            found: what stands there.
            remedy: what was expected and what to do.
        """
        self.count += 1
        if len(self._shown) < SHOWN:
            self._shown.append((row, f"row {row}, column {column!r}: found {found}; {remedy}"))

    def raise_if_any(self) -> None:
        """Ends with one `InputError` that lists the faults in the order of the rows, where there are any."""
        if not self.count:
            return
        lines = [text for _, text in sorted(self._shown, key=lambda item: item[0])]
        if self.count == 1:
            raise InputError(f"{self.path}: {lines[0]}")
        head = f"{self.path}: {self.count} problems"
        head += f", of which {SHOWN}:" if self.count > SHOWN else ":"
        raise InputError("\n".join([head, *(f"  {line}" for line in lines)]))
