"""The exception for invalid input; without heavy imports, so that the command line starts quickly."""

from __future__ import annotations


class InputError(ValueError):
    """Invalid user input; the message states what is wrong, where, what was expected, and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
