"""How much human video a pretraining sees (Fig. 8): one meaning of `human_fraction` for both models.

It keeps that part of the videos of every set marked `human`, and of the set's weight: a kept video is drawn as often as
with all of them,
and human video as a whole in proportion to its amount. What 20 % keeps lies inside what 40 % keeps, in the forward
model's latents and the
inverse model's videos alike, since the names of the videos decide. An epoch stays as long as with all human video.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def kept_fractions(sets: Mapping[str, Mapping[str, Any]], human_fraction: float) -> dict[str, float]:
    """The part of each set that a mixture keeps, 0 to 1. Raises ValueError for a fraction that is none, or that no set
    could follow."""
    if not 0 <= human_fraction <= 1:
        raise ValueError(f"human_fraction is a share between 0 and 1, got {human_fraction}")
    if human_fraction < 1 and not any(options.get("human") for options in sets.values()):
        raise ValueError(
            f"human_fraction={human_fraction}, but no set of this mixture is marked human ({', '.join(sets)}): nothing "
            "would change; "
            "mark one with human: true in data.sets"
        )
    return {name: human_fraction if options.get("human") else 1.0 for name, options in sets.items()}


def subset_videos(files: Sequence[Path], share: float) -> list[Path]:
    """`share` of the videos with these annotations, at least one unless it is 0, in their order; smaller shares lie
    inside larger ones."""
    count = max(round(share * len(files)), 1 if share else 0)
    ranked = sorted(files, key=lambda file: hashlib.sha256(file.stem.encode()).digest())
    kept = set(ranked[:count])
    return [file for file in files if file in kept]


@contextmanager
def explain_missing_set(name: str, share: float) -> Iterator[None]:
    """Around the opening of a set. Where nothing of it is drawn it is opened to count its clips, and need not be there
    if an epoch's length is given."""
    try:
        yield
    except FileNotFoundError as error:
        if share:
            raise
        raise FileNotFoundError(
            f"{error}; nothing of the set {name!r} is drawn, but with data.length=null an epoch is as long as with all "
            "human video: give data.length=<draws>, and the set need not be there"
        ) from error
