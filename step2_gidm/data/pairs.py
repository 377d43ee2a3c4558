"""Transitions: two frames about one second apart and the instruction, drawn from inside an episode (Sec. 3.2, A.2).

The second is measured by the frame rate of each set. No index is clamped to the end of an episode, so no pair consists
of the same frame twice. UniVLA and the release clamp: 61 % of Kuka's pairs and 29 % of Ego4D's then show no motion.
`gap="official"` does as they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as vision
from torch import Tensor

from common.errors import UserError
from common.video import resize
from step2_gidm.data.frame_gaps import GAPS


class FramePair(NamedTuple):
    """Two frames of an episode, not yet decoded."""

    id: str
    text: str
    frames: Any  # in the form of their set: encoded images, or where to read them
    size: int = 0  # bytes of the encoded images
    metadata: Mapping[str, Any] = MappingProxyType({})  # see Transitions.metadata


class EpisodeView(NamedTuple):
    """An opened episode, seen by one camera."""

    id: str
    length: int  # frames
    fps: float
    pair: Callable[[int, int], FramePair]  # the pair of the frames with these two indices; raises UnreadableSample


class Transitions:
    """Draws pairs of frames from episodes and preprocesses them. A subclass says where the frames come from.

    Args:
        image_size: side S of the square frames, in pixels.
        gap: how the distance of the two frames is chosen, "seconds" or "official" (step2_gidm.data.frame_gaps).
        gap_seconds, jitter, min_gap: options of gap="seconds".
        window, window_seconds: options of gap="official"; `window` is in frames, and `window_seconds` replaces it.
        augment: whether frames are cropped and recoloured at random.
        labelled: whether pairs also carry `metadata`, which evaluation needs.

    Raises UserError for an unknown `gap` or for bad options of it.
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
            raise UserError(f"unknown gap {gap!r}; use one of {', '.join(GAPS)}")
        self.image_size, self.augment, self.labelled = image_size, augment, labelled
        self.gap = GAPS[gap](
            seconds=gap_seconds, jitter=jitter, min_gap=min_gap, window=window, window_seconds=window_seconds
        )

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def unfiltered_length(self) -> int:
        """The number of episodes, including those that a `fraction` leaves out."""
        return len(self)

    def open_episode(self, index: int, rng: np.random.Generator | None = None) -> EpisodeView:
        """Open one episode. Where any camera may be used, `rng` draws one; without `rng` it is the first.

        Raises UnreadableSample where the episode is damaged.
        """
        raise NotImplementedError

    def decode(self, pair: FramePair) -> Sequence[np.ndarray]:
        """Both frames, each (H, W, 3) uint8. Raises UnreadableSample where they are damaged."""
        raise NotImplementedError

    def metadata(self, episode: str, scene: str, view: int | str, start: int, length: int) -> dict[str, Any]:
        """The labels of a pair that starts at frame `start` of `length`; empty unless `labelled`.

        They are episode, scene, view, and phase, which is where in the episode the pair starts, from 0 to 1. Where the
        set has it, the subclass adds state (2, D), the robot's readings at both frames.
        """
        if not self.labelled:
            return {}
        return {"episode": episode, "scene": scene, "view": view, "phase": start / max(1, length - 1)}

    def sample_pairs(self, index: int, rng: np.random.Generator, count: int = 1) -> list[FramePair]:
        """`count` pairs of one episode, which is opened once. Raises UnreadableSample."""
        episode = self.open_episode(index, rng)
        indices = self.sample_frame_indices(episode.id, episode.length, episode.fps, rng, count)
        return [episode.pair(start, end) for start, end in indices]

    def episode_pairs(self, index: int, steps: int) -> dict[str, Any]:
        """Up to `steps` pairs in order through one episode: id, text, frames (T, 2, 3, S, S).

        Raises UnreadableSample.
        """
        episode = self.open_episode(index)
        gap = self.gap(episode.id, episode.length, episode.fps, np.random.default_rng(0))[0]
        gap = min(gap, episode.length - 1)
        starts = np.unique(np.linspace(0, episode.length - 1 - gap, steps).round().astype(int)).tolist()
        pairs = [episode.pair(start, start + gap) for start in starts]
        frames = torch.stack([self.resize(self.decode(pair)) for pair in pairs])
        return {"id": episode.id, "text": pairs[0].text, "frames": frames}

    def load(self, pair: FramePair, rng: np.random.Generator) -> dict[str, Any]:
        """The sample of a pair: id, text, frames (2, 3, S, S) in [0, 1], and its metadata. Raises UnreadableSample."""
        return {"id": pair.id, "frames": self.preprocess(self.decode(pair), rng), "text": pair.text, **pair.metadata}

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The sample of a random pair of one episode. Raises UnreadableSample."""
        return self.load(self.sample_pairs(index, rng)[0], rng)

    def sample_frame_indices(
        self, id: str, length: int, fps: float, rng: np.random.Generator, count: int = 1
    ) -> list[tuple[int, int]]:
        """The indices of `count` pairs inside an episode of `length` frames at `fps` frames per second.

        Several pairs are spread over the episode: no first frame occurs twice while there are enough of them.
        """
        indices, shift = [], 0
        for part in range(count):
            distance, num_starts = self.gap(id, length, fps, rng)
            low, high = part * num_starts // count, (part + 1) * num_starts // count
            start = int(rng.integers(low, max(high, low + 1)))
            if count > 1 and not part:
                shift = int(rng.integers(num_starts))
            start = (start + shift) % num_starts
            indices.append((start, min(start + distance, length - 1)))
        return indices

    def preprocess(self, frames: Sequence[np.ndarray], rng: np.random.Generator) -> Tensor:
        """Two frames (H, W, 3) uint8, which may differ in size -> (2, 3, S, S) in [0, 1], augmented in training."""
        images = self.resize(frames)
        return augment_frames(images, rng) if self.augment else images

    def resize(self, frames: Sequence[np.ndarray]) -> Tensor:
        """Frames (H, W, 3) uint8, which may differ in size -> (T, 3, S, S) in [0, 1]."""
        return torch.cat([resize(frame[None], self.image_size) for frame in frames])


def augment_frames(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Random crop and colours as in UniVLA, the same for all frames of the pair: (T, 3, H, W) in [0, 1] -> the same."""
    size = images.shape[-1]
    side = max(1, round(size * 0.9**0.5))  # 0.9 of the area
    top, left = (int(v) for v in rng.integers(size - side + 1, size=2))
    images = vision.resized_crop(images, top, left, side, side, [size, size], antialias=True)
    images = (images + rng.uniform(-0.2, 0.2)).clamp(0, 1)
    images = vision.adjust_contrast(images, rng.uniform(0.8, 1.2))
    images = vision.adjust_saturation(images, rng.uniform(0.8, 1.2))
    return vision.adjust_hue(images, rng.uniform(-0.05, 0.05)).clamp(0, 1)
