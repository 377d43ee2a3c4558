"""How far apart the two frames of a pair lie: about a second (Sec. 3.2, A.2), or the release's windows of frames.

A gap takes (id, frames of the episode, frames a second, rng) and gives (distance, number of first frames to choose
from). It raises
FilteredSample for an episode that is too short for a pair, Unreadable where the clip is broken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.mixture import FilteredSample, UnreadableSample


class SecondsGap:
    """`seconds` times the set's frame rate, at least one step; where `seconds` is a list, every pair draws one of them.

    `jitter` varies the gap by up to that fraction. Both frames lie inside the episode. No pair spans less than `least`
    of the gap. An
    episode shorter than what is drawn gives its longest pair, so that short clips (Kuka, Ego4D) stay in use; one that
    is too short for
    `least` gives none.
    """

    def __init__(self, *, seconds: float | Sequence[float], jitter: float, least: float, **_: Any) -> None:
        self.seconds, self.jitter, self.least = (
            [seconds] if isinstance(seconds, (int, float)) else list(seconds),
            jitter,
            least,
        )
        if not self.seconds:
            raise ValueError("gap_seconds is an empty list; give one or more gaps in seconds")

    def __call__(self, id: str, length: int, fps: float, rng: np.random.Generator) -> tuple[int, int]:
        """See the module."""
        gap = _steps(
            id, self.seconds[0] if len(self.seconds) == 1 else self.seconds[rng.integers(len(self.seconds))], fps
        )
        least = max(1, round(self.least * gap))
        if length - 1 < least:
            raise FilteredSample(id, f"{length} frames are too few for pairs {gap} apart (min_gap={self.least})")
        wanted = round(gap * (1 + self.jitter * rng.uniform(-1, 1)))
        n = min(max(wanted, least), length - 1)
        return n, length - n


class WindowGap:
    """The release's: the first and last frame of a window of `window` frames, whatever the set's clock.

    `window_seconds` stands for it where a set keeps other frames than the release did (Ego4D: every 15th). A window
    that leaves the
    episode ends at its last frame, so pairs get shorter there, down to a frame beside itself.
    """

    def __init__(self, *, window: int, window_seconds: float | None, **_: Any) -> None:
        if window < 2:
            raise ValueError(f"a window of {window} frames holds no pair")
        self.window, self.seconds = window, window_seconds

    def __call__(self, id: str, length: int, fps: float, rng: np.random.Generator) -> tuple[int, int]:
        """See the module."""
        if length < 1:
            raise UnreadableSample(id, "an episode without frames")
        return self.window - 1 if self.seconds is None else _steps(id, self.seconds, fps), length


def _steps(id: str, seconds: float, fps: float) -> int:
    """Frames in so many seconds, at least one."""
    if fps <= 0:
        raise UnreadableSample(id, "its frame rate is unknown; give the set fps=")
    return max(1, round(fps * seconds))


GAPS = {"seconds": SecondsGap, "official": WindowGap}
