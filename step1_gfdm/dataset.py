"""Video sets on disk: annotation json -> latents to train on, or the video itself to look at (Sec. 3.1, A.2, Table 11).

    <set>/annotation/{train,val}/<id>.json     texts, videos[i].video_path, latent_videos[i].latent_video_path
    <set>/latent_videos/...                    .pt, fp32 (T, 4, h, w), already times the VAE's scale; also
    latent_videos_svd/
    <set>/videos/...

Clip rules are data. {span: episode} squeezes a whole video into the clip; {stride: 2, step_between_clips: 2} walks through it
at a
fixed pace, a clip starting at every second frame and its tail padded by repetition (both as VPP). T frames, F frames of
a clip.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import human_video, video
from common.errors import MissingFileError, UserError
from common.mixture import Mixture, UnreadableSample
from common.video_set import annotations, has_latents, known_length, latent_path, read_annotation, video_path


class ClipRule:
    """Which frames of a video make a clip: exactly one of `span="episode"` and `stride`."""

    def __init__(
        self, *, span: str | None = None, stride: int | None = None, step_between_clips: int | None = None
    ) -> None:
        if (span is None) == (stride is None) or span not in (None, "episode"):
            raise UserError(
                f"a clip rule is {{span: episode}} or {{stride: N, step_between_clips: N}}, got span={span!r}, "
                f"stride={stride!r}"
            )
        if stride is not None and min(stride, step_between_clips or stride) < 1:
            raise UserError(f"stride and step_between_clips are at least 1, got {stride} and {step_between_clips}")
        self.stride, self.step_between_clips = stride, step_between_clips or stride

    def count(self, length: int) -> int:
        """How many clips a video of `length` frames gives."""
        return 1 if self.stride is None else max(1, -(-length // self.step_between_clips))

    def frames(self, length: int, clip: int, num_frames: int) -> np.ndarray:
        """Frame numbers (F,) of one clip."""
        if self.stride is None:
            return np.linspace(0, length - 1, num_frames).astype(int)
        return np.minimum(clip * self.step_between_clips + self.stride * np.arange(num_frames), length - 1)


class VideoSet:
    """The annotations of one split of one set, and the clips that a rule cuts from them.

    root: the set's folder; annotation: its annotation folder ("annotation_abc_13" for VPP's CALVIN); max_frames drops
    longer
    videos (VPP: 100); views: camera number -> probability; fraction keeps that share of the videos (common.human_video), of
    whose clips there
    are `whole` without it. A set without a val folder keeps every 20th of its training videos for it.
    An annotation that cannot be read stays in the count and raises UnreadableSample when it is drawn.
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
            raise UserError(f"{root}: view probabilities must be positive, got {views}")
        self.views, self.view_shares = [int(v) for v in views], np.array([p / total for p in views.values()])
        folder = self.root / annotation / split
        files = annotations(self.root / annotation, split)
        if not files:
            raise MissingFileError(
                f"{folder}: no annotations here; record them with scripts/playtable_record.sh or convert a published "
                "set "
                "(data/README.md)"
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
        """Clip number over the whole set -> annotation file and clip number within it."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.root}: clip {index} of {len(self)}")
        episode = int(np.searchsorted(self._ends, index, side="right"))
        return self.files[episode], index - (int(self._ends[episode - 1]) if episode else 0)

    def draw_view(self, file: Path, record: Mapping[str, Any], rng: np.random.Generator) -> int:
        """One of the cameras, which the episode must have."""
        view = int(rng.choice(self.views, p=self.view_shares))
        if isinstance(record.get("videos"), list) and view >= len(record["videos"]):
            raise UnreadableSample(
                str(file),
                f"has {len(record['videos'])} cameras, camera {view} is asked for; set this set's views in the data "
                "config",
            )
        return view


class LatentClips(VideoSet):
    """Training clips: latents (F, 4, h, w) and the sentence. latent_shape: (4, h, w) that every file must have."""

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
        latent_shape: tuple[int, int, int] = (4, 32, 32),
    ) -> None:
        super().__init__(
            root,
            split,
            num_frames=num_frames,
            clip=clip,
            annotation=annotation,
            max_frames=max_frames,
            views=views,
            fraction=fraction,
        )
        self.latent_shape = tuple(latent_shape)
        if not has_latents(self.root):
            raise MissingFileError(
                f"{self.root}: no latents (latent_videos/); make them with scripts/step1_prepare_data_latent.sh "
                f"videos={self.root}"
            )

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """One clip as a VideoBatch item; the camera is drawn."""
        file, clip = self.locate(index)
        record = read_annotation(file)
        view = self.draw_view(file, record, rng)
        latents = self._latents(file, record, view)
        frames = self.rule.frames(len(latents), clip, self.num_frames)
        return {"id": f"{file}#{view}:{clip}", "latents": latents[frames].float(), "text": record["texts"][0]}

    def _latents(self, file: Path, record: dict[str, Any], view: int) -> Tensor:
        path = latent_path(self.root, file, record, view)
        try:
            latents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise UnreadableSample(
                str(path), f"not a latent file ({str(error).splitlines()[0][:120]}); encode it again"
            ) from error
        if not isinstance(latents, Tensor) or tuple(latents.shape[1:]) != self.latent_shape or not len(latents):
            found = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise UnreadableSample(
                str(path),
                f"holds {found}, needs (T, {', '.join(map(str, self.latent_shape))}); encode it at this scale",
            )
        length = known_length(record)
        if length is not None and length != len(latents):
            raise UnreadableSample(
                str(path), f"holds {len(latents)} frames, its annotation says {length}; encode it again"
            )
        if not torch.isfinite(latents).all():
            raise UnreadableSample(str(path), "holds NaN or infinity; encode it again")
        return latents


class VideoClips(VideoSet):
    """Clips of the videos themselves: frames (F, 3, size, size) in [0, 1] and the sentence."""

    def __init__(
        self,
        root: str | Path,
        split: str = "val",
        *,
        num_frames: int,
        clip: Mapping[str, Any],
        image_size: int,
        annotation: str = "annotation",
        max_frames: int | None = None,
        views: Mapping[int, float] | None = None,
        fraction: float = 1.0,
        aspect: str = "squeeze",
    ) -> None:
        super().__init__(
            root,
            split,
            num_frames=num_frames,
            clip=clip,
            annotation=annotation,
            max_frames=max_frames,
            views=views,
            fraction=fraction,
        )
        self.image_size, self.aspect = image_size, aspect

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """One clip as a FrameBatch item; the camera is drawn."""
        file, clip = self.locate(index)
        record = read_annotation(file)
        view = self.draw_view(file, record, rng)
        path = video_path(self.root, file, record, view)
        try:
            length, _, _ = video.probe(path)
            wanted = self.rule.frames(length, clip, self.num_frames)
            unique, back = np.unique(wanted, return_inverse=True)
            frames = video.read_frames(path, unique)[back]
        except video.VideoError as error:
            raise UnreadableSample(str(path), str(error)) from error
        return {
            "id": f"{file}#{view}:{clip}",
            "frames": video.resize(frames, self.image_size, self.aspect),
            "text": record["texts"][0],
        }

    def states(self, index: int) -> np.ndarray | None:
        """The robot's readings (F, D) at a clip's frames, None where the annotation has none."""
        file, clip = self.locate(index)
        states = read_annotation(file).get("state")
        if not isinstance(states, list) or not states:
            return None
        return np.asarray(states, np.float64)[self.rule.frames(len(states), clip, self.num_frames)]


def mixture(
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
    """Table 11 as data. Each set: {weight, clip, and optionally folder, annotation, views, max_frames, human}.

    Clips are latents, or the videos themselves where an `image_size` is given. `human_fraction` keeps that share of the
    videos and of
    the weight of the sets marked `human` (common.human_video, Fig. 8). `length` is how many draws count as an epoch; None: as
    many as there
    are clips, those of all human video included. At `human_fraction` 0 the human sets need not be on disk where
    `length` is given.
    """
    kept_fractions = human_video.kept_fractions(sets, human_fraction)
    members, weights, unfiltered_length = {}, {}, 0
    for name, options in sets.items():
        options, share = dict(options), kept_fractions[name]
        weight = options.pop("weight")
        options.pop("human", None)
        folder = Path(root) / options.pop("folder", name)
        if weight == 0 or (share == 0 and length is not None):
            continue
        options["fraction"] = share
        with human_video.explain_missing_set(name, share):
            clips = (
                LatentClips(folder, split, num_frames=num_frames, latent_shape=latent_shape, **options)
                if image_size is None
                else VideoClips(folder, split, num_frames=num_frames, image_size=image_size, **options)
            )
        unfiltered_length += clips.unfiltered_length
        if share > 0:
            members[name], weights[name] = clips, weight * share
    return Mixture(members, weights, length or unfiltered_length)
