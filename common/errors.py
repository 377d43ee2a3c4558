"""The errors that mean bad input: their message is the whole answer, so a program ends with that one line."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input or a wrong setting. The message says what is wrong, where it is, and what to do about it.

    Programs (common.program) print the message alone and exit with status 1. Every other exception keeps its
    traceback, because it is a bug of this project or of a library.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file or a folder that the input names does not exist."""


class OutputExistsError(UserError, FileExistsError):
    """The output would overwrite something that exists already."""


class UnreadableSample(UserError):
    """One sample cannot be read. The training loop counts it, logs its id and draws another one in its place.

    id: what was read, usually a path or "<set>/<episode>". reason: why it cannot be read.
    """

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(f"{id}: {reason}")
        self.id, self.reason = id, reason

    def __reduce__(self) -> tuple:
        return type(self), (self.id, self.reason)


class FilteredSample(UnreadableSample):
    """One sample is intact, but a rule excludes it, for example because it has no sentence or is too short.

    It is replaced as an unreadable one is, but counted separately, and however many there are, they stop no run.
    """


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite; the message names the samples of the batch."""


def check_at_least_one(**settings: float) -> None:
    """Raise UserError for the first setting that is below 1."""
    for key, value in settings.items():
        if value < 1:
            raise UserError(f"{key}={value}: must be at least 1")
