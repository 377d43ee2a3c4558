"""Data sets as their authors publish them, as episodes of video with sentences (A.2, Table 11).

A source lists its episodes from annotations alone, and reads one when asked. Frames come as (T, H, W, 3) uint8 in
batches, so
that a long video never lies in memory whole. What cannot be used is listed with its reason, and counted by `convert`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from common import calvin_format as calvin
from common import rlds, video
from common.mixture import FilteredSample, UnreadableSample

BATCH = 64  # frames
NO_CAPTION, SCENE_D = "no caption", "scene D"
REJECTED, NOT_WEARER, NO_FRAMES = "rejected by Ego4D", "not the camera wearer", "no frames annotated"
FILTER_REASONS = (NO_CAPTION, SCENE_D, REJECTED, NOT_WEARER, NO_FRAMES)  # reasons that tell nothing about the files
CAPTIONS = ("text", "caption", "label", "sentence")
VIDEOS = ("video", "file", "path", "video_path")
SUFFIXES = (".mp4", ".webm", ".avi", ".mov", ".mkv")


@dataclass(frozen=True)
class EpisodeEntry:
    """An episode by name: unique within its set, or not usable for `reason`."""

    id: str
    split: str = "train"
    reason: str | None = None
    key: Any = None  # what the source needs to read it


class Camera(NamedTuple):
    """One view of an episode: how many frames, how fast, and all of them in batches."""

    length: int
    fps: float
    batches: Iterator[np.ndarray]


class Episode(NamedTuple):
    """Sentences, cameras and, where the set has them, the robot's readings (T, D), the hand's position first, and the
    name of its scene."""

    texts: list[str]
    cameras: list[Camera]
    state: np.ndarray | None = None
    scene: str | None = None


class Source(Protocol):
    """What `convert` reads."""

    def episodes(self) -> list[EpisodeEntry]:
        """All episodes, in a fixed order, without opening a video."""
        ...

    def read(self, listed: EpisodeEntry) -> Episode:
        """One episode. Raises UnreadableSample, VideoError, RldsError or CalvinFormatError."""
        ...


class SomethingSomethingSource:
    """Something-Something-v2: <root>/labels/{train,validation}.json, <root>/20bn-something-something-v2/<id>.webm.

    The published test set has no sentences. Older label files carry a prefix in their name, and any file in between may
    be
    laid flat in <root>.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.videos = next(
            (self.root / name for name in ("20bn-something-something-v2", "videos") if (self.root / name).is_dir()),
            self.root,
        )

    def episodes(self) -> list[EpisodeEntry]:
        """See Source."""
        found = []
        for split, name in (("train", "train.json"), ("val", "validation.json")):
            places = [path for folder in (self.root / "labels", self.root) for path in sorted(folder.glob(f"*{name}"))]
            if not places:
                continue
            for entry in _json(places[0], list):
                text = entry.get("label") or ""
                reason = None if text.strip() else NO_CAPTION
                found.append(
                    EpisodeEntry(str(entry["id"]), split, reason, (str(self.videos / f"{entry['id']}.webm"), text))
                )
        return found or _nothing(self.root, "labels/train.json or labels/validation.json of Something-Something-v2")

    def read(self, listed: EpisodeEntry) -> Episode:
        """See Source."""
        path, text = listed.key
        return Episode([text], [_file(path)])


class FolderSource:
    """Any folder of videos with a csv or json of captions.

    csv: a column `video` (or file, path), a column `text` (or caption, label), and if wanted `start` and `end` in
    seconds,
    `split` and `id`. json: a list of such records, or {video: text}.
    """

    def __init__(self, root: str | Path, captions: str | Path | None = None) -> None:
        self.root = Path(root)
        beside = [self.root / f"captions{suffix}" for suffix in (".csv", ".json")]
        self.captions = Path(captions) if captions else next((path for path in beside if path.is_file()), beside[0])

    def episodes(self) -> list[EpisodeEntry]:
        """See Source."""
        return [self._listed(number, record) for number, record in enumerate(self._records())] or _nothing(
            self.root, f"captions in {self.captions}"
        )

    def read(self, listed: EpisodeEntry) -> Episode:
        """See Source."""
        path, text, start, end = listed.key
        return Episode([text], [_file(path, start, end)])

    def _records(self) -> list[dict[str, Any]]:
        if self.captions.suffix == ".csv":
            if not self.captions.is_file():
                raise FileNotFoundError(f"{self.captions}: no captions; name a csv or json with captions=")
            with self.captions.open(newline="", encoding="utf-8-sig") as stream:
                return list(csv.DictReader(stream))
        content = _json(self.captions, (list, dict))
        return (
            [{"video": name, "text": text} for name, text in content.items()] if isinstance(content, dict) else content
        )

    def _listed(self, number: int, record: dict[str, Any]) -> EpisodeEntry:
        name = next((record[key] for key in VIDEOS if record.get(key)), None)
        text = str(next((record[key] for key in CAPTIONS if record.get(key)), "")).strip()
        if not name:
            raise ValueError(f"{self.captions}: record {number} names no video; it needs one of {', '.join(VIDEOS)}")
        path = self.root / name
        if not path.resolve().is_relative_to(self.root.resolve()):
            return EpisodeEntry(str(record.get("id") or name), reason="path leaves the folder")
        start, end = (float(record[key]) if record.get(key) not in (None, "") else None for key in ("start", "end"))
        cut = "" if start is None else f"_{start:g}"
        return EpisodeEntry(
            str(record.get("id") or f"{Path(name).with_suffix('')}{cut}"),
            str(record.get("split") or "train"),
            None if text else NO_CAPTION,
            (str(path), text, start, end),
        )


class Rlds:
    """Robot episodes in an RLDS folder (Bridge, Fractal): every split that is there; `val` and `test` become val.

    names: registry names, the first that lies under `root` counts; images: feature of each camera; text, state: of the
    sentence and
    the readings; each as a list of names of which the first that is there counts (releases of one set differ).
    """

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str],
        *,
        images: Sequence[Sequence[str]],
        text: Sequence[str],
        fps: float,
        state: Sequence[str] = (),
    ) -> None:
        root = Path(root)
        self.folder = root if (root / "dataset_info.json").is_file() else rlds.find_version_folder(root, names)
        self.images, self.text, self.state, self.fps = images, text, state, fps
        self.sets = {split: rlds.Rlds(self.folder, split) for split in rlds.splits(self.folder)}

    def episodes(self) -> list[EpisodeEntry]:
        """See Source."""
        return [
            EpisodeEntry(f"{split}_{index}", "train" if split == "train" else "val", key=(split, index))
            for split, episodes in self.sets.items()
            for index in range(len(episodes))
        ]

    def read(self, listed: EpisodeEntry) -> Episode:
        """See Source."""
        split, index = listed.key
        episode = self.sets[split][index]
        text = episode.text(_first(episode, self.text)).strip()
        if not text:
            raise FilteredSample(episode.id, NO_CAPTION)
        state = next((episode.values(name) for name in self.state if episode.has(name)), None)
        return Episode([text], [self._camera(episode, _first(episode, image)) for image in self.images], state)

    def _camera(self, episode: rlds.Episode, image: str) -> Camera:
        return Camera(len(episode), self.fps, _batches(len(episode), lambda place: episode.image(image, place)))


class CalvinSource:
    """CALVIN: one episode per annotated segment, cameras static and gripper; the training split of ABC.

    Scene D is what the paper evaluates in: its frames are left out, in ABCD's training split as well (scene_info.npy
    tells), unless
    `scene_d` asks for them. `val` is then the validation split, which is D.
    """

    FPS = 30.0

    def __init__(self, root: str | Path, *, scene_d: bool = False, lang_folder: str = "lang_annotations") -> None:
        self.root, self.scene_d, self.lang_folder = Path(root), scene_d, lang_folder

    def episodes(self) -> list[EpisodeEntry]:
        """See Source."""
        found = []
        for split, name in [("training", "train")] + [("validation", "val")] * self.scene_d:
            folder = self.root / split
            scenes = calvin.read_scenes(folder)
            withheld = [span for scene, span in scenes.items() if scene.upper().endswith("D") and not self.scene_d]
            for number, (note, _) in enumerate(
                calvin.read_annotations(folder, calvin.read_recordings(folder), self.lang_folder)
            ):
                in_d = any(note.start <= last and note.end >= first for first, last in withheld)
                key = (split, note.start, note.end, note.text, calvin.scene_of(note.start, scenes))
                found.append(EpisodeEntry(f"{name}_{number:06d}", name, SCENE_D if in_d else None, key))
        return found

    def read(self, listed: EpisodeEntry) -> Episode:
        """See Source."""
        split, start, end, text, scene = listed.key

        def camera(key: str) -> Camera:
            length = end - start + 1
            return Camera(
                length,
                self.FPS,
                _batches(length, lambda place: calvin.read_frame(self.root / split, start + place, [key])[key]),
            )

        state = np.stack(
            [calvin.read_frame(self.root / split, frame, ["robot_obs"])["robot_obs"] for frame in range(start, end + 1)]
        )
        return Episode([text], [camera(key) for key in calvin.KEYS.values()], state, scene)


class Ego4dSource:
    """Ego4D's hand-object benchmark: clips/<clip_uid>.mp4 or full_scale/<video_uid>.mp4, cut around each narrated
    action of fho_main.json.

    Where both are there, the clip is read. A cut is the action's pre to post frame, or its start to end where those are
    not annotated.
    Only what the camera wearer does ("#C C cuts the carrot" -> "cuts the carrot"), neither rejected nor invalid.
    """

    WEARER = re.compile(r"^\s*#c\s+c\s+", re.IGNORECASE)
    TAG = re.compile(r"#\w+")

    def __init__(
        self,
        root: str | Path,
        *,
        clips: str = "clips",
        videos: str = "full_scale",
        annotations: str = "annotations/fho_main.json",
    ) -> None:
        self.root, self.clips, self.videos, self.annotations = Path(root), clips, videos, annotations

    def episodes(self) -> list[EpisodeEntry]:
        """See Source."""
        content = _json(self.root / self.annotations, dict)
        found, number = [], {}
        intervals = [
            (entry.get("video_uid"), interval)
            for entry in content.get("videos", [])
            for interval in entry.get("annotated_intervals", [])
        ]
        for whole, interval in intervals:
            name = str(interval.get("clip_uid") or whole)
            path, counted = self._file(interval.get("clip_uid"), whole)
            for action in interval.get("narrated_actions") or []:
                number[name] = number.get(name, -1) + 1
                found.append(self._listed(f"{name}_{number[name]:03d}", path, counted, action))
        return found or _nothing(self.root, f"narrated actions in {self.annotations}")

    def read(self, listed: EpisodeEntry) -> Episode:
        """See Source."""
        path, text, first, last = listed.key
        length, fps, _ = video.probe(path)
        if not 0 <= first <= last < length:
            raise UnreadableSample(listed.id, f"frames {first}..{last} of a clip of {length}")
        return Episode([text], [Camera(last - first + 1, fps, video.read_batches(path, first, last, BATCH))])

    def _file(self, clip: str | None, whole: str | None) -> tuple[str, str]:
        """The file of an interval, and what the keys of its frame numbers begin with: those of a clip count from the
        clip's first."""
        cut, uncut = self.root / self.clips / f"{clip}.mp4", self.root / self.videos / f"{whole}.mp4"
        return (str(uncut), "") if uncut.is_file() and not cut.is_file() else (str(cut), "clip_")

    def _listed(self, id: str, path: str, counted: str, action: dict[str, Any]) -> EpisodeEntry:
        text = str(action.get("narration_text") or "")
        if action.get("is_rejected") or action.get("is_invalid_annotation") or action.get("is_valid_action") is False:
            return EpisodeEntry(id, reason=REJECTED)
        if not self.WEARER.match(text):
            return EpisodeEntry(id, reason=NOT_WEARER if text.strip() else NO_CAPTION)
        sentence = " ".join(self.TAG.sub(" ", self.WEARER.sub("", text)).split()).strip(" .")
        critical = action.get(f"{counted}critical_frames") or {}
        first, last = (
            action.get(f"{counted}{edge}_frame") if critical.get(key) is None else critical[key]
            for key, edge in (("pre_frame", "start"), ("post_frame", "end"))
        )
        if first is None or last is None or not sentence:
            return EpisodeEntry(id, reason=NO_CAPTION if not sentence else NO_FRAMES)
        return EpisodeEntry(id, key=(path, sentence, int(first), int(last)))


def _first(episode: rlds.Episode, names: Sequence[str]) -> str:
    found = next((name for name in names if episode.has(name)), None)
    if found is None:
        raise rlds.RldsError(f"{episode.id}: has none of {', '.join(names)}; name its feature in the source's config")
    return found


def _batches(length: int, frame: Callable[[int], np.ndarray]) -> Iterator[np.ndarray]:
    for start in range(0, length, BATCH):
        yield np.stack([frame(place) for place in range(start, min(start + BATCH, length))])


def _file(path: str, start: float | None = None, end: float | None = None) -> Camera:
    """A video file, or the part of it between two times in seconds."""
    length, fps, _ = video.probe(path)
    first = 0 if start is None else round(start * fps)
    last = length if end is None else min(round(end * fps), length)
    if not 0 <= first < last:
        raise UnreadableSample(path, f"{start}..{end} s is no part of {length / fps if fps else 0:.1f} s")
    return Camera(last - first, fps, video.read_batches(path, first, last - 1, BATCH))


def _json(path: Path, kind: type | tuple[type, ...]) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; see data/README.md for where a source looks")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path}: holds a {type(content).__name__} where the published file has another structure")
    return content


def _nothing(root: Path, what: str) -> list[EpisodeEntry]:
    raise FileNotFoundError(f"{root}: found no {what}")
