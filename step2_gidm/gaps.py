"""How far apart the two frames of a pair lie: about a second (Sec. 3.2, A.2), or the release's windows of frames.

A gap takes (id, frames of the episode, frames a second, rng) and gives (distance, number of first frames to choose from). It raises
Unreadable for an episode that has no pair.
"""
from __future__ import annotations

import numpy as np

from common.mixture import Unreadable


class Seconds:
    """`seconds` times the set's frame rate, at least one step; `jitter` varies it by up to that fraction. Both frames lie inside the episode.

    An episode shorter than the gap gives its longest pair if that is at least `least` of the gap: with 1.0 every pair spans the full
    gap, with less short clips (Kuka, Ego4D) stay in use.
    """

    def __init__(self, *, seconds: float, jitter: float, least: float, window: int) -> None:
        self.seconds, self.jitter, self.least = seconds, jitter, least

    def __call__(self, id: str, length: int, fps: float, rng: np.random.Generator) -> tuple[int, int]:
        """See the module."""
        if fps <= 0:
            raise Unreadable(id, "its frame rate is unknown; give the set fps=")
        gap = max(1, round(fps * self.seconds))
        wanted = max(1, round(gap * (1 + self.jitter * rng.uniform(-1, 1))))
        n = min(wanted, length - 1)
        if n < max(1, round(self.least * gap)):
            raise Unreadable(id, f"{length} frames are too few for pairs {gap} apart (min_gap={self.least})")
        return n, length - n


class Windows:
    """The release's: the first and last frame of a window of `window` frames, whatever the set's clock.

    A window that leaves the episode ends at its last frame, so pairs get shorter there, down to a frame beside itself.
    """

    def __init__(self, *, seconds: float, jitter: float, least: float, window: int) -> None:
        if window < 2:
            raise ValueError(f"a window of {window} frames holds no pair")
        self.window = window

    def __call__(self, id: str, length: int, fps: float, rng: np.random.Generator) -> tuple[int, int]:
        """See the module."""
        if length < 1:
            raise Unreadable(id, "an episode without frames")
        return self.window - 1, length


GAPS = {"seconds": Seconds, "official": Windows}
