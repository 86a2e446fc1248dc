"""The error of bad input; light, so that the command line can import it before anything heavy."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input by a user: names what was read, what was found, what was expected, and the remedy.

    The command line prints it without a traceback and ends with status 2.
    """
