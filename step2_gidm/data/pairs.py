"""Transitions: two frames about one second apart and the instruction, drawn inside an episode and pictured (Sec. 3.2,
A.2).

Every set measures the second by its own frame rate. No index is clamped to an episode's end, so no pair shows a frame
beside
itself (UniVLA and the release clamp: 61 % of Kuka's pairs and 29 % of Ego4D's do not move; `gap="official"` does as
they do).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as vision
from torch import Tensor

from common.video import resize
from step2_gidm.data.frame_gaps import GAPS


class FramePair(NamedTuple):
    """Two frames of an episode, not yet decoded."""

    id: str
    text: str
    frames: Any  # as their set keeps them: encoded images, or where they lie
    size: int = 0  # bytes of encoded images
    metadata: Mapping[str, Any] = MappingProxyType({})  # labels, where they were asked for


class EpisodeView(NamedTuple):
    """An opened episode, seen by one camera."""

    id: str
    length: int  # frames
    fps: float
    pair: Callable[[int, int], FramePair]  # of the frames with these two numbers; raises UnreadableSample


class Transitions:
    """How pairs are drawn and pictured; subclasses say where frames come from.

    `gap` is "seconds" or "official" (step2_gidm.data.frame_gaps). `gap_seconds`, `jitter` and `min_gap` belong to the first,
    `window`, in frames, and
    `window_seconds`, which wins, to the second. With `labelled` pairs also carry what evaluation knows them by, where
    the set has it:
    episode, scene, view, phase (where in the episode the pair starts, 0 to 1) and state (2, D), the robot's readings at
    both moments.
    """

    def __init__(
        self,
        *,
        image_size: int,
        gap: str = "seconds",
        gap_seconds: float | Sequence[float] = 1.0,
        jitter: float = 0.0,
        min_gap: float = 0.5,
        window: int = 10,
        window_seconds: float | None = None,
        augment: bool = False,
        labelled: bool = False,
    ) -> None:
        if gap not in GAPS:
            raise ValueError(f"unknown gap {gap!r}; use one of {', '.join(GAPS)}")
        self.image_size, self.augment, self.labelled = image_size, augment, labelled
        self.gap = GAPS[gap](
            seconds=gap_seconds, jitter=jitter, least=min_gap, window=window, window_seconds=window_seconds
        )

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def unfiltered_length(self) -> int:
        """How many episodes there are, also those that a `fraction` does not keep."""
        return len(self)

    def open_episode(self, index: int, rng: np.random.Generator | None = None) -> EpisodeView:
        """One episode. Where the camera is drawn, `rng` draws it; without one it is the first. Raises UnreadableSample where
        the episode is bad."""
        raise NotImplementedError

    def decode(self, pair: FramePair) -> Sequence[np.ndarray]:
        """Both frames, (H, W, 3) uint8. Raises UnreadableSample where they are broken."""
        raise NotImplementedError

    def metadata(self, episode: str, scene: str, view: int | str, start: int, length: int) -> dict[str, Any]:
        """What evaluation knows a pair by that starts at frame `start` of `length`; empty unless `labelled`. The state
        is the subclass's to add."""
        return (
            {"episode": episode, "scene": scene, "view": view, "phase": start / max(1, length - 1)}
            if self.labelled
            else {}
        )

    def pairs(self, index: int, rng: np.random.Generator, count: int = 1) -> list[FramePair]:
        """`count` pairs of one episode from one opening of it. Raises UnreadableSample."""
        clip = self.open_episode(index, rng)
        return [clip.pair(start, end) for start, end in self.sample_frame_indices(clip.id, clip.length, clip.fps, rng, count)]

    def episode_pairs(self, index: int, steps: int) -> dict[str, Any]:
        """Up to `steps` pairs in order through one episode: id, text, frames (T, 2, 3, S, S). Raises UnreadableSample."""
        clip = self.open_episode(index)
        gap = min(self.gap(clip.id, clip.length, clip.fps, np.random.default_rng(0))[0], clip.length - 1)
        pairs = [
            clip.pair(now, now + gap)
            for now in np.unique(np.linspace(0, clip.length - 1 - gap, steps).round().astype(int)).tolist()
        ]
        frames = torch.stack([self.fit(self.decode(pair)) for pair in pairs])
        return {"id": clip.id, "text": pairs[0].text, "frames": frames}

    def show(self, pair: FramePair, rng: np.random.Generator) -> dict[str, Any]:
        """A pair as a sample."""
        return {"id": pair.id, "frames": self.picture(self.decode(pair), rng), "text": pair.text, **pair.metadata}

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """A random pair of one episode. Raises UnreadableSample."""
        return self.show(self.pairs(index, rng)[0], rng)

    def sample_frame_indices(self, id: str, length: int, fps: float, rng: np.random.Generator, count: int = 1) -> list[tuple[int, int]]:
        """`count` pairs of indices inside an episode of `length` frames at `fps` frames a second.

        Several are spread over the episode: no first frame comes twice while there are enough of them.
        """
        found, shift = [], 0
        for part in range(count):
            n, starts = self.gap(id, length, fps, rng)
            low, high = part * starts // count, (part + 1) * starts // count
            place = int(rng.integers(low, max(high, low + 1)))
            if count > 1 and not part:
                shift = int(rng.integers(starts))
            start = (place + shift) % starts
            found.append((start, min(start + n, length - 1)))
        return found

    def picture(self, frames: Sequence[np.ndarray], rng: np.random.Generator) -> Tensor:
        """Two (H, W, 3) uint8 frames, of one size or not -> (2, 3, S, S) in [0, 1]."""
        images = self.fit(frames)
        return perturb(images, rng) if self.augment else images

    def fit(self, frames: Sequence[np.ndarray]) -> Tensor:
        """The same, never augmented."""
        return torch.cat([resize(frame[None], self.image_size) for frame in frames])


def perturb(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Crop and colours as in UniVLA, one draw for all images of the pair: (T, 3, H, W) in [0, 1] -> the same."""
    size = images.shape[-1]
    side = max(1, round(size * 0.9**0.5))  # 0.9 of the area
    top, left = (int(v) for v in rng.integers(size - side + 1, size=2))
    images = vision.resized_crop(images, top, left, side, side, [size, size], antialias=True)
    images = (images + rng.uniform(-0.2, 0.2)).clamp(0, 1)
    images = vision.adjust_contrast(images, rng.uniform(0.8, 1.2))
    images = vision.adjust_saturation(images, rng.uniform(0.8, 1.2))
    return vision.adjust_hue(images, rng.uniform(-0.05, 0.05)).clamp(0, 1)
