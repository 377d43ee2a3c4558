"""How far apart the two frames of a pair lie: about a second (Sec. 3.2, A.2), or the release's windows of frames.

A gap is called with (id of the episode, its number of frames, frames per second, rng). It returns the distance of the
two frames and the number of first frames to choose from, which are the first ones of the episode. It raises
FilteredSample where the episode is too short for a pair, and UnreadableSample where the clip is broken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.errors import FilteredSample, UnreadableSample, UserError


class SecondsGap:
    """`seconds` times the frame rate of the set, at least one frame; of several `seconds`, each pair draws one.

    `jitter` varies the gap by up to that fraction. Both frames lie inside the episode. No pair spans less than the
    fraction `min_gap` of the gap. An episode that is shorter than the gap gives its longest pair, so that short clips
    (Kuka, Ego4D) remain in use; one that is too short for `min_gap` gives none.
    """

    def __init__(self, *, seconds: float | Sequence[float], jitter: float, min_gap: float, **_: Any) -> None:
        self.seconds = [seconds] if isinstance(seconds, (int, float)) else list(seconds)
        self.jitter, self.min_gap = jitter, min_gap
        if not self.seconds:
            raise UserError("gap_seconds is an empty list; give one or more gaps in seconds")

    def __call__(self, id: str, length: int, fps: float, rng: np.random.Generator) -> tuple[int, int]:
        """See the module."""
        seconds = self.seconds[0] if len(self.seconds) == 1 else self.seconds[rng.integers(len(self.seconds))]
        gap = _num_frames(id, seconds, fps)
        shortest = max(1, round(self.min_gap * gap))
        if length - 1 < shortest:
            raise FilteredSample(id, f"{length} frames are too few for pairs {gap} apart (min_gap={self.min_gap})")
        drawn = round(gap * (1 + self.jitter * rng.uniform(-1, 1)))
        distance = min(max(drawn, shortest), length - 1)
        return distance, length - distance


class WindowGap:
    """The release's gap: the first and the last frame of a window of `window` frames, whatever the frame rate.

    `window_seconds` replaces it for a set of which the release keeps other frames than we do (Ego4D: every 15th). A
    window that crosses the end of the episode ends at its last frame, so pairs get shorter there, and the last one
    consists of the same frame twice.
    """

    def __init__(self, *, window: int, window_seconds: float | None, **_: Any) -> None:
        if window < 2:
            raise UserError(f"a window of {window} frames holds no pair; give window=2 or more")
        self.window, self.seconds = window, window_seconds

    def __call__(self, id: str, length: int, fps: float, rng: np.random.Generator) -> tuple[int, int]:
        """See the module."""
        if length < 1:
            raise UnreadableSample(id, "an episode without frames")
        return self.window - 1 if self.seconds is None else _num_frames(id, self.seconds, fps), length


def _num_frames(id: str, seconds: float, fps: float) -> int:
    """The number of frames in `seconds`, at least one."""
    if fps <= 0:
        raise UnreadableSample(id, "its frame rate is unknown; give the set fps=")
    return max(1, round(fps * seconds))


GAPS = {"seconds": SecondsGap, "official": WindowGap}
