"""Transitions: two frames about one second apart and the instruction (Sec. 3.2, A.2, Table 12, Fig. 8).

Every set measures the second by its own frame rate. Pairs lie inside an episode: no index is clamped to the end, so no
pair shows a frame beside itself (UniVLA and the release clamp: 61 % of Kuka's pairs and 29 % of Ego4D's do not move).
A set without a val split of its own holds out every twentieth episode.
"""
from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.transforms.v2.functional as vision
from torch import Tensor

from common import rlds
from common.mixture import Mixture, SampleSet, Unreadable
from common.video import VideoError, probe, read_frames, resize
from step2_gidm.oxe import HUMAN_SHARE, OXE

HELD_OUT = 20  # one episode in twenty is held out where a set has no split of its own (UniVLA: the last 5 %)


class Transitions:
    """How pairs are drawn and pictured; subclasses say where frames come from.

    `gap_seconds` times the set's frame rate, at least one step, is the distance of a pair; `jitter` varies it by up to
    that fraction. An episode shorter than the gap gives its longest pair if that is at least `min_gap` of the gap,
    else it is Unreadable: with 1.0 every pair spans the full gap, with less short clips (Kuka, Ego4D) stay in use.
    With `labelled` pairs also carry what evaluation knows them by, where the set has it: episode, scene, view, phase (where
    in the episode the pair starts, 0 to 1) and state (2, D), the robot's readings at both moments.
    """

    def __init__(self, *, image_size: int, gap_seconds: float = 1.0, jitter: float = 0.0, min_gap: float = 0.5,
                 augment: bool = False, labelled: bool = False) -> None:
        self.image_size, self.gap_seconds, self.jitter, self.min_gap, self.augment = image_size, gap_seconds, jitter, min_gap, augment
        self.labelled = labelled

    def draw(self, id: str, length: int, fps: float, rng: np.random.Generator) -> tuple[int, int]:
        """Indices (t, t + n) inside an episode of `length` frames at `fps` frames a second."""
        if fps <= 0:
            raise Unreadable(id, "its frame rate is unknown; give the set fps=")
        gap = max(1, round(fps * self.gap_seconds))
        wanted = max(1, round(gap * (1 + self.jitter * rng.uniform(-1, 1))))
        n = min(wanted, length - 1)
        if n < max(1, round(self.min_gap * gap)):
            raise Unreadable(id, f"{length} frames are too few for pairs {gap} apart (min_gap={self.min_gap})")
        start = int(rng.integers(length - n))
        return start, start + n

    def picture(self, frames: Sequence[np.ndarray], rng: np.random.Generator) -> Tensor:
        """Two (H, W, 3) uint8 frames -> (2, 3, S, S) in [0, 1]."""
        images = resize(np.stack(frames), self.image_size)
        return perturb(images, rng) if self.augment else images


class VideoTransitions(Transitions):
    """A video-set folder: annotation/{split}/<id>.json beside videos (human video, playtable, VPP's sets).

    `view` is the index of a camera, or None to draw one each time. `fps` overrides containers that lie about their rate
    (VPP's Bridge and RT-1 say 3). `fraction` keeps that share of the clips, the same ones in every run (Fig. 8).
    """

    def __init__(self, folder: str | Path, split: str = "train", *, fps: float | None = None, view: int | None = 0,
                 fraction: float = 1.0, **pairs: Any) -> None:
        super().__init__(**pairs)
        self.folder, self.fps, self.view = Path(folder), fps, view
        own = any((self.folder / "annotation" / "val").glob("*.json"))
        files = sorted((self.folder / "annotation" / (split if own else "train")).glob("*.json"))
        if not files:
            raise FileNotFoundError(f"{self.folder}/annotation/{split}: no json here; a video set holds annotation/{split}/<id>.json and videos/")
        self.files = files if own else [files[i] for i in _part(len(files), split)]
        self._probed: dict[Path, tuple[int, float]] = {}
        if fraction < 1:
            order = np.random.default_rng(0).permutation(len(self.files))
            self.files = [self.files[i] for i in sorted(order[:round(fraction * len(order))])]

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """A random pair of one clip. Raises Unreadable for a bad annotation or video."""
        file = self.files[index]
        id = f"{self.folder.name}/{file.stem}"
        text, videos, states = _annotation(id, file)
        view = int(rng.integers(len(videos))) if self.view is None else self.view
        path, length, fps = self._video(id, videos, view)
        start, end = self.draw(id, length, fps, rng)
        try:
            frames = read_frames(path, [start, end])
        except VideoError as error:
            raise Unreadable(id, str(error)) from error
        pair = {"id": f"{id}/{view}@{start}+{end - start}", "frames": self.picture(frames, rng), "text": text}
        if self.labelled:
            pair |= {"episode": str(file), "scene": str(self.folder), "view": view, "phase": start / (length - 1)}
            if states:
                if len(states) != length:
                    raise Unreadable(id, f"{len(states)} readings of the robot for {length} frames")
                pair["state"] = np.asarray([states[start], states[end]], np.float64)
        return pair

    def walk(self, index: int, steps: int) -> dict[str, Any]:
        """Up to `steps` pairs in order through one clip: id, text, frames (T, 2, 3, S, S). Raises Unreadable."""
        file = self.files[index]
        id = f"{self.folder.name}/{file.stem}"
        text, videos, _ = _annotation(id, file)
        view = self.view or 0
        path, length, fps = self._video(id, videos, view)
        start, end = self.draw(id, length, fps, np.random.default_rng(0))
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


class RldsTransitions(Transitions):
    """An RLDS folder. `image` and `text` are paths inside a step, `fps` the control rate.

    Episodes without an instruction are Unreadable, as UniVLA drops them.
    """

    def __init__(self, folder: str | Path, split: str = "train", *, fps: float, image: str = "observation/image",
                 text: str = "language_instruction", check_crc: bool = False, **pairs: Any) -> None:
        super().__init__(**pairs)
        self.fps, self.image, self.text = fps, image, text
        own = "val" in rlds.splits(folder)
        self.episodes = rlds.Rlds(folder, split if own else "train", check_crc=check_crc)
        self.kept = list(range(len(self.episodes))) if own else _part(len(self.episodes), split)

    def __len__(self) -> int:
        return len(self.kept)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """A random pair of one episode. Raises Unreadable for a corrupt or too short one."""
        name = f"{self.episodes.name}/{self.kept[index]}"
        try:
            episode = self.episodes[self.kept[index]]
            start, end = self.draw(name, len(episode), self.fps, rng)
            text = episode.text(self.text, start)
            frames = [episode.image(self.image, i) for i in (start, end)]
        except rlds.RldsError as error:
            raise Unreadable(name, str(error)) from error
        if not text.strip():
            raise Unreadable(name, f"no instruction under {self.text}")
        return {"id": f"{name}@{start}+{end - start}", "frames": self.picture(frames, rng), "text": text}


def mixture(sets: Mapping[str, Mapping[str, Any]], *, split: str = "train", human_fraction: float = 1.0,
            length: int | None = None, augment: bool = False, **pairs: Any) -> Mixture:
    """Sets drawn by weight. Each set: {video: folder or rlds: folder, and optionally weight, human, and what its class takes}.

    Without a weight a set counts by its size. `human_fraction` keeps that part of the clips of sets marked `human` and
    of their weight, since a share follows a set's size (Fig. 8); at 0 they need not be on disk. Only training augments.
    """
    if not 0 <= human_fraction <= 1:
        raise ValueError(f"human_fraction is a share between 0 and 1, got {human_fraction}")
    pairs = {**pairs, "augment": augment and split == "train"}
    members: dict[str, SampleSet] = {}
    weights: dict[str, float] = {}
    for name, options in sets.items():
        options = dict(options)
        weight, share = options.pop("weight", None), human_fraction if options.pop("human", False) else 1.0
        if share == 0 or weight == 0:
            continue
        if len({"video", "rlds"} & set(options)) != 1:
            raise ValueError(f"set {name!r} needs one of video=<folder> and rlds=<folder>, got {sorted(options)}")
        if "rlds" in options:
            members[name] = RldsTransitions(options.pop("rlds"), split, **options, **pairs)
        else:
            members[name] = VideoTransitions(options.pop("video"), split, fraction=share, **options, **pairs)
        weights[name] = len(members[name]) if weight is None else weight * share
    return Mixture(members, weights, length)


def open_x(root: str | Path, *, human_root: str | Path, names: Collection[str] | None = None, human_fraction: float = 1.0,
           **options: Any) -> Mixture:
    """Table 12: the 26 robot sets under `root` and Ego4D as a video set, drawn with the paper's shares.

    `names` restricts the robot sets; shares are normalised. Everything else is `mixture`'s.
    """
    names = list(OXE) if names is None else list(names)
    unknown = set(names) - set(OXE)
    if unknown:
        raise ValueError(f"unknown Open X-Embodiment sets {sorted(unknown)}; known: {', '.join(OXE)}")
    sets: dict[str, dict[str, Any]] = {}
    for name in names:
        row = OXE[name]
        sets[name] = {"rlds": rlds.find(root, row.folders), "weight": row.share, "fps": row.hz, "image": row.image, "text": row.text}
    sets["ego4d"] = {"video": human_root, "weight": HUMAN_SHARE, "human": True}
    return mixture(sets, human_fraction=human_fraction, **options)


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


def _part(count: int, split: str) -> list[int]:
    """Episodes of "train" or "val" in a set that has only one split on disk."""
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}; use train or val")
    held_out = set(range(HELD_OUT - 1, count, HELD_OUT)) or {count - 1}
    return [i for i in range(count) if (i in held_out) == (split == "val")]


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
    return record["texts"][0], [video["video_path"] for video in record["videos"]], record.get("state") or []
