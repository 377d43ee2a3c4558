"""What `convert` and `encode` do about unreadable input and a full disk."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError

MIN_TRIED = 20  # before so many were tried, the fraction of unreadable ones is not judged while a run goes on


def check_unreadable_fraction(unreadable: int, tried: int, limit: float, *, what: str, out: Path) -> None:
    """Raise UserError where more than the fraction `limit` of what was tried ("episodes", "videos") is unreadable."""
    if tried and unreadable / tried > limit:
        raise UserError(
            f"{unreadable} of {tried} {what} are unreadable, more than max_unreadable_fraction={limit}: repair those "
            f"named above, or raise max_unreadable_fraction; what is finished stays in {out}"
        )


@contextmanager
def explain_full_disk(out: Path) -> Iterator[None]:
    """Turn the error of a full disk into a UserError that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"{out}: the disk is full; free some space and run the same command again, it keeps what is finished"
            ) from error
        raise
