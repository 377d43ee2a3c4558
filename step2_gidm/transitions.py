"""Transitions: two frames about one second apart and the instruction (Sec. 3.2, A.2), from RLDS, videos and CALVIN's npz.

Every set measures the second by its own frame rate. Pairs lie inside an episode: no index is clamped to the end, so no
pair shows a frame beside itself (UniVLA and the release clamp: 61 % of Kuka's pairs and 29 % of Ego4D's do not move;
`gap="official"` does as they do). A set without a val split of its own holds out every twentieth episode.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as vision
from torch import Tensor

from common import calvin_format, rlds
from common.mixture import Unreadable
from common.video import VideoError, probe, read_frames, resize
from step2_gidm.gaps import GAPS

HELD_OUT = 20  # one episode in twenty is held out where a set has no split of its own (UniVLA: the last 5 %)


class Pair(NamedTuple):
    """Two frames of an episode, not yet decoded."""

    id: str
    text: str
    frames: Any  # as their set keeps them: encoded images, or where they lie
    size: int = 0  # bytes of encoded images
    about: Mapping[str, Any] = MappingProxyType({})  # labels, where they were asked for


class Transitions:
    """How pairs are drawn and pictured; subclasses say where frames come from.

    `gap` is "seconds" or "official" (step2_gidm.gaps). `gap_seconds`, `jitter` and `min_gap` belong to the first, `window`, in frames, to
    the second. With `labelled` pairs also carry what evaluation knows them by, where the set has it: episode, scene, view, phase (where in the
    episode the pair starts, 0 to 1) and state (2, D), the robot's readings at both moments.
    """

    def __init__(self, *, image_size: int, gap: str = "seconds", gap_seconds: float = 1.0, jitter: float = 0.0, min_gap: float = 0.5,
                 window: int = 10, augment: bool = False, labelled: bool = False) -> None:
        if gap not in GAPS:
            raise ValueError(f"unknown gap {gap!r}; use one of {', '.join(GAPS)}")
        self.image_size, self.augment, self.labelled = image_size, augment, labelled
        self.gap = GAPS[gap](seconds=gap_seconds, jitter=jitter, least=min_gap, window=window)

    def __len__(self) -> int:
        raise NotImplementedError

    def pairs(self, index: int, rng: np.random.Generator, count: int = 1) -> list[Pair]:
        """`count` pairs of one episode from one reading of it. Raises Unreadable where the episode is bad."""
        raise NotImplementedError

    def decode(self, pair: Pair) -> Sequence[np.ndarray]:
        """Both frames, (H, W, 3) uint8. Raises Unreadable where they are broken."""
        raise NotImplementedError

    def show(self, pair: Pair, rng: np.random.Generator) -> dict[str, Any]:
        """A pair as a sample."""
        return {"id": pair.id, "frames": self.picture(self.decode(pair), rng), "text": pair.text, **pair.about}

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """A random pair of one episode. Raises Unreadable."""
        return self.show(self.pairs(index, rng)[0], rng)

    def draw(self, id: str, length: int, fps: float, rng: np.random.Generator, count: int = 1) -> list[tuple[int, int]]:
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
        images = torch.cat([resize(frame[None], self.image_size) for frame in frames])
        return perturb(images, rng) if self.augment else images


class VideoTransitions(Transitions):
    """A video-set folder: annotation/{split}/<id>.json beside videos (human video, playtable, VPP's sets).

    `view` is the index of a camera, or None to draw one each time. `fps` overrides containers that lie about their rate
    (VPP's Bridge says 3). `fraction` keeps that share of the clips, the same ones in every run (Fig. 8). `only` names the one split
    on disk to train on and to hold out from (VPP's samples have val alone).
    """

    def __init__(self, folder: str | Path, split: str = "train", *, fps: float | None = None, view: int | None = 0,
                 fraction: float = 1.0, only: str | None = None, **pairs: Any) -> None:
        super().__init__(**pairs)
        self.folder, self.fps, self.view = Path(folder), fps, view
        own = only is None and any((self.folder / "annotation" / "val").glob("*.json"))
        place = self.folder / "annotation" / (split if own else only or "train")
        files = sorted(place.glob("*.json"))
        if not files:
            others = sorted({path.parent.name for path in self.folder.glob("annotation/*/*.json")})
            hint = f"there is {' and '.join(others)}: only={others[0]} shares it out" if others else "a video set holds annotation/train/<id>.json and videos/"
            raise FileNotFoundError(f"{place}: no json here; {hint}")
        self.files = files if own else [files[i] for i in _part(len(files), split)]
        self._probed: dict[Path, tuple[int, float]] = {}
        if fraction < 1:
            order = np.random.default_rng(0).permutation(len(self.files))
            self.files = [self.files[i] for i in sorted(order[:round(fraction * len(order))])]

    def __len__(self) -> int:
        return len(self.files)

    def pairs(self, index: int, rng: np.random.Generator, count: int = 1) -> list[Pair]:
        """See Transitions. Frames stay in their video: it is small, and seeks are cheap."""
        file = self.files[index]
        id = f"{self.folder.name}/{file.stem}"
        text, videos, states = _annotation(id, file)
        view = int(rng.integers(len(videos))) if self.view is None else self.view
        path, length, fps = self._video(id, videos, view)
        if self.labelled and states and len(states) != length:
            raise Unreadable(id, f"{len(states)} readings of the robot for {length} frames")
        found = []
        for start, end in self.draw(id, length, fps, rng, count):
            about = {"episode": str(file), "scene": str(self.folder), "view": view, "phase": start / (length - 1)} if self.labelled else {}
            if about and states:
                about["state"] = np.asarray([states[start], states[end]], np.float64)
            found.append(Pair(f"{id}/{view}@{start}+{end - start}", text, (path, start, end), about=about))
        return found

    def walk(self, index: int, steps: int) -> dict[str, Any]:
        """Up to `steps` pairs in order through one clip: id, text, frames (T, 2, 3, S, S). Raises Unreadable."""
        file = self.files[index]
        id = f"{self.folder.name}/{file.stem}"
        text, videos, _ = _annotation(id, file)
        view = self.view or 0
        path, length, fps = self._video(id, videos, view)
        [(start, end)] = self.draw(id, length, fps, np.random.default_rng(0))
        now = np.unique(np.linspace(0, length - 1 - (end - start), steps).round().astype(int))
        try:
            frames = resize(read_frames(path, [*now, *(now + end - start)]), self.image_size)
        except VideoError as error:
            raise Unreadable(id, str(error)) from error
        return {"id": f"{id}/{view}", "text": text, "frames": frames.unflatten(0, (2, -1)).transpose(0, 1)}

    def _video(self, id: str, videos: Sequence[str], view: int) -> tuple[Path, int, float]:
        """File, length and frame rate of one camera's video."""
        if view >= len(videos):
            raise Unreadable(id, f"has {len(videos)} views, view {view} was asked for")
        path = self.folder / videos[view]
        try:
            if path not in self._probed:
                self._probed[path] = probe(path)[:2]
        except VideoError as error:
            raise Unreadable(id, str(error)) from error
        length, rate = self._probed[path]
        return path, length, self.fps or rate

    def decode(self, pair: Pair) -> Sequence[np.ndarray]:
        """See Transitions."""
        path, start, end = pair.frames
        try:
            return read_frames(path, [start, end])
        except VideoError as error:
            raise Unreadable(pair.id, str(error)) from error


class CalvinTransitions(Transitions):
    """A folder of CALVIN's npz frames, such as task_ABC_D/training or what playtable records: pairs inside the annotated segments.

    `view` is "static", "gripper", or None to draw one each time. The twentieth that is held out are whole recordings, where there are
    several.
    """

    def __init__(self, folder: str | Path, split: str = "train", *, fps: float = 30.0, view: str | None = "static",
                 lang_folder: str = "lang_annotations", **pairs: Any) -> None:
        super().__init__(**pairs)
        if view is not None and view not in calvin_format.KEYS:
            raise ValueError(f"unknown view {view!r}; use {', '.join(calvin_format.KEYS)} or null for any")
        self.folder, self.fps = Path(folder), fps
        self.views = [view] if view else list(calvin_format.KEYS)
        recordings = calvin_format.read_recordings(self.folder)
        found = calvin_format.read_annotations(self.folder, recordings, lang_folder)
        kept = set(_part(len(recordings) if len(recordings) > 1 else len(found), split).tolist())
        self.segments = [note for number, (note, row) in enumerate(found) if (row if len(recordings) > 1 else number) in kept]

    def __len__(self) -> int:
        return len(self.segments)

    def pairs(self, index: int, rng: np.random.Generator, count: int = 1) -> list[Pair]:
        """See Transitions. Frames stay in their files, one each."""
        note = self.segments[index]
        view = self.views[int(rng.integers(len(self.views)))]
        name = f"{self.folder.parent.name}/{self.folder.name}"
        id = f"{name}/{note.start:07d}-{note.end:07d}"
        if not note.text.strip():
            raise Unreadable(id, "an annotation without a sentence")
        found, length = [], note.end - note.start + 1
        for start, end in self.draw(id, length, self.fps, rng, count):
            frames = note.start + start, note.start + end
            about = {} if not self.labelled else {"episode": id, "scene": str(self.folder), "view": view, "phase": start / (length - 1),
                                                  "state": self._states(id, frames)}
            found.append(Pair(f"{name}/{frames[0]:07d}/{view}+{end - start}", note.text, (*frames, calvin_format.KEYS[view]), about=about))
        return found

    def _states(self, id: str, frames: Sequence[int]) -> np.ndarray:
        """(2, 15) the robot's readings."""
        try:
            return np.stack([calvin_format.read_frame(self.folder, frame, ["robot_obs"])["robot_obs"] for frame in frames]).astype(np.float64)
        except calvin_format.CalvinFormatError as error:
            raise Unreadable(id, str(error)) from error

    def decode(self, pair: Pair) -> Sequence[np.ndarray]:
        """See Transitions."""
        *frames, key = pair.frames
        try:
            images = [calvin_format.read_frame(self.folder, frame, [key])[key] for frame in frames]
            return [rlds.decode(image, f"{pair.id}: {key}") for image in images]
        except (calvin_format.CalvinFormatError, rlds.RldsError) as error:
            raise Unreadable(pair.id, str(error)) from error


class RldsTransitions(Transitions):
    """An RLDS folder. `image` and `text` are paths inside a step, `fps` the control rate.

    Episodes without an instruction are Unreadable, as UniVLA drops them.
    """

    def __init__(self, folder: str | Path, split: str = "train", *, fps: float, image: str = "observation/image",
                 text: str = "language_instruction", **pairs: Any) -> None:
        super().__init__(**pairs)
        self.fps, self.image, self.text = fps, image, text
        own = "val" in rlds.splits(folder)
        self.episodes = rlds.Rlds(folder, split if own else "train")
        self.kept = np.arange(len(self.episodes)) if own else _part(len(self.episodes), split)

    def __len__(self) -> int:
        return len(self.kept)

    def pairs(self, index: int, rng: np.random.Generator, count: int = 1) -> list[Pair]:
        """See Transitions. A record has to be read whole, so its pairs come with the bytes of their images."""
        name = f"{self.episodes.name}/{self.kept[index]}"
        found = []
        try:
            episode = self.episodes[int(self.kept[index])]
            for start, end in self.draw(name, len(episode), self.fps, rng, count):
                text = episode.text(self.text, start)
                if not text.strip():
                    raise Unreadable(name, f"no instruction under {self.text}")
                frames = tuple(episode.encoded(self.image, i) for i in (start, end))
                size = sum(frame.nbytes if isinstance(frame, np.ndarray) else len(frame) for frame in frames)
                found.append(Pair(f"{name}@{start}+{end - start}", text, frames, size))
        except rlds.RldsError as error:
            raise Unreadable(name, str(error)) from error
        return found

    def decode(self, pair: Pair) -> Sequence[np.ndarray]:
        """See Transitions."""
        try:
            return [rlds.decode(frame, f"{self.image} of its {which} frame") for frame, which in zip(pair.frames, ("first", "second"))]
        except rlds.RldsError as error:
            raise Unreadable(pair.id, str(error)) from error


def perturb(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Crop and colours as in UniVLA, one draw for all images of the pair: (T, 3, H, W) in [0, 1] -> the same."""
    size = images.shape[-1]
    side = max(1, round(size * 0.9 ** 0.5))  # 0.9 of the area
    top, left = (int(v) for v in rng.integers(size - side + 1, size=2))
    images = vision.resized_crop(images, top, left, side, side, [size, size], antialias=True)
    images = (images + rng.uniform(-0.2, 0.2)).clamp(0, 1)
    images = vision.adjust_contrast(images, rng.uniform(0.8, 1.2))
    images = vision.adjust_saturation(images, rng.uniform(0.8, 1.2))
    return vision.adjust_hue(images, rng.uniform(-0.05, 0.05)).clamp(0, 1)


def _part(count: int, split: str) -> np.ndarray:
    """Episodes of "train" or "val" in a set that has only one split on disk."""
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}; use train or val")
    held_out = np.arange(count) % HELD_OUT == HELD_OUT - 1
    held_out[-1:] |= not held_out.any()
    return np.flatnonzero(held_out == (split == "val"))


def _annotation(id: str, file: Path) -> tuple[str, list[str], list[list[float]]]:
    """The first sentence, the video paths and the robot's readings (none: empty) of an annotation."""
    try:
        record = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Unreadable(id, f"{file} is not JSON ({error})") from error
    if not isinstance(record, dict) or not record.get("texts"):
        raise Unreadable(id, f"{file} has no 'texts'")
    if not record.get("videos"):
        raise Unreadable(id, f"{file} has no 'videos'")
    if not str(record["texts"][0]).strip():
        raise Unreadable(id, f"{file} has an empty sentence")
    return record["texts"][0], [video["video_path"] for video in record["videos"]], record.get("state") or []
