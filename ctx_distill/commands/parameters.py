"""How command-line arguments are parsed: annotations that several commands use."""

from __future__ import annotations

from typing import Annotated, TypeVar

from cyclopts import Parameter

T = TypeVar("T")

Overrides = Annotated[str, Parameter(name="OVERRIDES", allow_leading_hyphen=True)]
"""Anything that is not an option of the command: passed on to LightningCLI."""

Flat = Annotated[T, Parameter(name="*")]
"""A dataclass whose fields become options of the command."""
