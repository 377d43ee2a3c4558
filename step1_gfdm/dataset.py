"""Training data of step 1: clips of video sets, as latents or as frames, and their mixture (Sec. 3.1, A.2, Table 11).

common.video_set describes the format of a set. A clip rule says which frames of a video make a clip, both as in VPP:
{span: episode} spreads the clip's frames evenly over the whole video; {stride: 2, step_between_clips: 2} takes every
second frame, with a clip starting at every second frame, and repeats the last frame where the video ends.
T frames of a video, F frames of a clip, c x h x w latent.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import human_video, video
from common.errors import MissingFileError, UnreadableSample, UserError
from common.mixture import Mixture
from common.progress import tqdm
from common.video_set import annotations, has_latents, known_length, latent_path, read_annotation, video_path


class ClipRule:
    """Which frames of a video make a clip: exactly one of `span="episode"` and `stride`.

    step_between_clips: frames between the starts of two clips, `stride` unless given. Raises UserError.
    """

    def __init__(
        self, *, span: str | None = None, stride: int | None = None, step_between_clips: int | None = None
    ) -> None:
        if (span is None) == (stride is None) or span not in (None, "episode"):
            raise UserError(
                "a clip rule is either {span: episode} or {stride: N, step_between_clips: N}, but this one has "
                f"span={span!r} and stride={stride!r}"
            )
        if stride is not None and min(stride, step_between_clips or stride) < 1:
            raise UserError(
                f"stride and step_between_clips of a clip rule are at least 1, not {stride} and {step_between_clips}"
            )
        self.stride, self.step_between_clips = stride, step_between_clips or stride

    def count(self, length: int) -> int:
        """How many clips a video of `length` frames gives."""
        return 1 if self.stride is None else max(1, -(-length // self.step_between_clips))

    def frames(self, length: int, clip: int, num_frames: int) -> np.ndarray:
        """The frame indices (num_frames,) of clip number `clip` of a video of `length` frames."""
        if self.stride is None:
            return np.linspace(0, length - 1, num_frames).astype(int)
        return np.minimum(clip * self.step_between_clips + self.stride * np.arange(num_frames), length - 1)


class VideoSet:
    """The annotations of one split of a video set, and the clips that a rule makes of them.

    root: the folder of the set. clip: arguments of ClipRule.
    annotation: the annotation folder within it ("annotation_abc_13" for VPP's CALVIN).
    max_frames: leave out longer videos (VPP: 100).
    views: camera number -> probability of drawing it.
    fraction: use this share of the videos (common.human_video). `unfiltered_length` is the number of clips without it.

    A set without a val split holds out a twentieth of its training videos. A video whose annotation cannot be read
    counts as one clip, and raises UnreadableSample when that is drawn.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        num_frames: int,
        clip: Mapping[str, Any],
        annotation: str = "annotation",
        max_frames: int | None = None,
        views: Mapping[int, float] | None = None,
        fraction: float = 1.0,
    ) -> None:
        self.root, self.num_frames, self.rule = Path(root), num_frames, ClipRule(**clip)
        views = dict(views or {0: 1.0})
        total = sum(views.values())
        if total <= 0 or min(views.values()) < 0:
            raise UserError(f"{root}: the probabilities of views must not be negative and not all zero, got {views}")
        self.views, self.view_probabilities = [int(v) for v in views], np.array([p / total for p in views.values()])
        files = annotations(self.root / annotation, split)
        if not files:
            raise MissingFileError(
                f"{self.root / annotation / split}: no annotations here; record a set with "
                "scripts/playtable_record.sh or convert a published one (data/README.md)"
            )
        counts: dict[Path, int] = {}
        for file in tqdm(files, desc=f"{self.root.name}/{split}", unit="json", disable=len(files) < 1000, leave=False):
            try:
                length = known_length(read_annotation(file))
            except UnreadableSample:
                length = None
            if max_frames is None or length is None or length <= max_frames:
                counts[file] = 1 if length is None else self.rule.count(length)
        self.unfiltered_length = sum(counts.values())
        self.files = human_video.subset_videos(list(counts), fraction)
        self._ends = np.cumsum([counts[file] for file in self.files], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, index: int) -> tuple[Path, int]:
        """Index of a clip in the set -> its annotation file, and its index within that video."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.root}: clip {index} of {len(self)}")
        episode = int(np.searchsorted(self._ends, index, side="right"))
        return self.files[episode], index - (int(self._ends[episode - 1]) if episode else 0)

    def draw_view(self, file: Path, record: Mapping[str, Any], rng: np.random.Generator) -> int:
        """The number of a random camera. Raises UnreadableSample where the episode does not have it."""
        view = int(rng.choice(self.views, p=self.view_probabilities))
        if isinstance(record.get("videos"), list) and view >= len(record["videos"]):
            raise UnreadableSample(
                str(file),
                f"has {len(record['videos'])} cameras, and camera {view} was drawn; set the views of this set in the "
                "data config",
            )
        return view


class LatentClips(VideoSet):
    """Clips as latents (F, c, h, w) with their sentence.

    latent_shape: the shape (c, h, w) that every latent file must have. The other arguments are those of VideoSet.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        latent_shape: tuple[int, int, int] = (4, 32, 32),
        **options: Any,
    ) -> None:
        super().__init__(root, split, **options)
        self.latent_shape = tuple(latent_shape)
        if not has_latents(self.root):
            raise MissingFileError(
                f"{self.root}: no latents (latent_videos/); make them with scripts/step1_prepare_data_latent.sh "
                f"videos={self.root}"
            )

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """One clip, of a random camera, as an item of VideoBatch. Raises UnreadableSample."""
        file, clip = self.locate(index)
        record = read_annotation(file)
        view = self.draw_view(file, record, rng)
        latents = self._read_latents(file, record, view)  # (T, c, h, w)
        frames = self.rule.frames(len(latents), clip, self.num_frames)
        return {"id": f"{file}#{view}:{clip}", "latents": latents[frames].float(), "text": record["texts"][0]}

    def _read_latents(self, file: Path, record: dict[str, Any], view: int) -> Tensor:
        path = latent_path(self.root, file, record, view)
        try:
            latents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise UnreadableSample(
                str(path), f"is not a latent file ({str(error).splitlines()[0][:120]}); encode it again"
            ) from error
        if not isinstance(latents, Tensor) or tuple(latents.shape[1:]) != self.latent_shape or not len(latents):
            found = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            expected = ", ".join(map(str, self.latent_shape))
            raise UnreadableSample(str(path), f"holds {found}, needs (T, {expected}); encode it at this scale")
        length = known_length(record)
        if length is not None and length != len(latents):
            raise UnreadableSample(
                str(path), f"holds {len(latents)} frames, its annotation says {length}; encode it again"
            )
        if not torch.isfinite(latents).all():
            raise UnreadableSample(str(path), "holds NaN or infinity; encode it again")
        return latents


class VideoClips(VideoSet):
    """Clips as frames (F, 3, size, size) in [0, 1] with their sentence.

    image_size, aspect: how frames are resized (common.video.resize). The other arguments are those of VideoSet.
    """

    def __init__(
        self, root: str | Path, split: str = "val", *, image_size: int, aspect: str = "squeeze", **options: Any
    ) -> None:
        super().__init__(root, split, **options)
        self.image_size, self.aspect = image_size, aspect

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """One clip, of a random camera, as an item of FrameBatch. Raises UnreadableSample."""
        file, clip = self.locate(index)
        record = read_annotation(file)
        view = self.draw_view(file, record, rng)
        path = video_path(self.root, file, record, view)
        try:
            length, _, _ = video.probe(path)
            unique, inverse = np.unique(self.rule.frames(length, clip, self.num_frames), return_inverse=True)
            frames = video.read_frames(path, unique)[inverse]  # (F, H, W, 3) uint8
        except video.VideoError as error:
            raise UnreadableSample(str(path), str(error)) from error
        return {
            "id": f"{file}#{view}:{clip}",
            "frames": video.resize(frames, self.image_size, self.aspect),
            "text": record["texts"][0],
        }

    def states(self, index: int) -> np.ndarray | None:
        """The robot's readings (F, D) at the frames of a clip; None where the annotation has none."""
        file, clip = self.locate(index)
        states = read_annotation(file).get("state")
        if not isinstance(states, list) or not states:
            return None
        return np.asarray(states, np.float64)[self.rule.frames(len(states), clip, self.num_frames)]


def build_mixture(
    root: str | Path,
    sets: Mapping[str, Mapping[str, Any]],
    *,
    split: str = "train",
    num_frames: int,
    latent_shape: tuple[int, int, int] = (4, 32, 32),
    image_size: int | None = None,
    human_fraction: float = 1.0,
    length: int | None = None,
) -> Mixture:
    """The mixture of Table 11, as a sample set.

    sets: name -> {weight, clip, and optionally folder, annotation, views, max_frames, human}.
    Clips are latents; with `image_size` they are frames.
    human_fraction: the share of the videos, and of the weight, of the sets marked `human` (common.human_video, Fig. 8).
    length: draws that count as an epoch; None means as many as there are clips, those of all human videos included.

    At human_fraction=0 the human sets need not exist if `length` is given. Raises UserError.
    """
    kept_fractions = human_video.kept_fractions(sets, human_fraction)
    members, weights, unfiltered_length = {}, {}, 0
    for name, options in sets.items():
        options, fraction = dict(options), kept_fractions[name]
        weight = options.pop("weight")
        options.pop("human", None)
        folder = Path(root) / options.pop("folder", name)
        if weight == 0 or (fraction == 0 and length is not None):
            continue
        options |= {"num_frames": num_frames, "fraction": fraction}
        with human_video.explain_missing_set(name, fraction):
            clips = (
                LatentClips(folder, split, latent_shape=latent_shape, **options)
                if image_size is None
                else VideoClips(folder, split, image_size=image_size, **options)
            )
        unfiltered_length += clips.unfiltered_length
        if fraction > 0:
            members[name], weights[name] = clips, weight * fraction
    return Mixture(members, weights, length or unfiltered_length)
