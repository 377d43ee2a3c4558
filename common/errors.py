"""The errors that mean bad input: their message is the whole answer, so a program ends with that one line."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input or a wrong setting. The message says what is wrong, where it is, and what to do about it.

    Programs (common.program) print the message alone and exit with status 1. Every other exception keeps its
    traceback, because it is a bug of this project or of a library.
    """
