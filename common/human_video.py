"""How much human video the pretraining sees (Fig. 8): `human_fraction` means the same for both models.

It keeps that share of the videos of every set marked `human`, and the same share of the set's weight. A kept video is
therefore drawn as often as before, and human video as a whole in proportion to its amount. The videos that 20 % keep
are among those that 40 % keep, for the forward model's latents and the inverse model's videos alike, because the names
of the videos decide. The length of an epoch does not change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import MissingFileError, UserError


def kept_fractions(sets: Mapping[str, Mapping[str, Any]], human_fraction: float) -> dict[str, float]:
    """The share of each set that a mixture keeps, 0 to 1.

    Raises UserError for a fraction outside [0, 1], and where no set is marked human.
    """
    if not 0 <= human_fraction <= 1:
        raise UserError(f"human_fraction is a share between 0 and 1, got {human_fraction}")
    if human_fraction < 1 and not any(options.get("human") for options in sets.values()):
        raise UserError(
            f"human_fraction={human_fraction}, but no set of this mixture is marked human ({', '.join(sets)}): nothing "
            "would change; mark one with human: true in data.sets"
        )
    return {name: human_fraction if options.get("human") else 1.0 for name, options in sets.items()}


def subset_videos(files: Sequence[Path], share: float) -> list[Path]:
    """A `share` of the videos with these annotation files, in the given order; at least one unless the share is 0.

    The videos of a smaller share are among those of a larger one.
    """
    count = max(round(share * len(files)), 1 if share else 0)
    ranked = sorted(files, key=lambda file: hashlib.sha256(file.stem.encode()).digest())
    kept = set(ranked[:count])
    return [file for file in files if file in kept]


@contextmanager
def explain_missing_set(name: str, share: float) -> Iterator[None]:
    """Wraps the opening of a set and explains a MissingFileError where nothing is drawn from the set.

    Such a set is opened only to count its clips, so it may be missing if the length of an epoch is given.
    """
    try:
        yield
    except MissingFileError as error:
        if share:
            raise
        raise MissingFileError(
            f"{error}; nothing is drawn from the set {name!r}, but with data.length=null an epoch is as long as with "
            "all human video: give data.length=<draws>, and the set may be missing"
        ) from error
