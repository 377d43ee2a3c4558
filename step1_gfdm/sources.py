"""Data sets as their authors publish them, read as episodes of video with sentences (A.2, Table 11).

A source lists its episodes from annotations alone, without opening a video, and reads one episode at a time. Frames
come in batches (n, H, W, 3) of uint8 RGB, so that a long video is never in memory as a whole. An episode that cannot be
used is listed with the reason, which `convert` counts.
T frames of an episode, D numbers of a reading of the robot.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from common import calvin_format as calvin
from common import rlds, video
from common.errors import FilteredSample, MissingFileError, UnreadableSample, UserError

BATCH_SIZE = 64  # frames
NO_CAPTION, SCENE_D = "no caption", "scene D"
REJECTED, NOT_WEARER, NO_FRAMES = "rejected by Ego4D", "not the camera wearer", "no frames annotated"
FILTER_REASONS = (
    NO_CAPTION,
    SCENE_D,
    REJECTED,
    NOT_WEARER,
    NO_FRAMES,
)  # a rule excludes the episode; its files are fine
CAPTION_KEYS = ("text", "caption", "label", "sentence")
VIDEO_KEYS = ("video", "file", "path", "video_path")


@dataclass(frozen=True)
class EpisodeEntry:
    """An episode in the list of a source.

    id: unique within its split. reason: why it cannot be used, None for a usable one. key: whatever `read` needs.
    """

    id: str
    split: str = "train"
    reason: str | None = None
    key: Any = None


class Camera(NamedTuple):
    """One camera's video of an episode: number of frames, frames per second, and the frames in batches."""

    length: int
    fps: float
    batches: Iterator[np.ndarray]  # each (n, H, W, 3) uint8 RGB


class Episode(NamedTuple):
    """Sentences and cameras of an episode, and where the set has them, the robot's readings and the scene's name."""

    texts: list[str]
    cameras: list[Camera]
    state: np.ndarray | None = None  # (T, D), the position of the hand first
    scene: str | None = None


class Source(Protocol):
    """What `convert` asks of a data set."""

    def episodes(self) -> list[EpisodeEntry]:
        """All episodes in a fixed order. Opens no video. Raises UserError where the data set is not there."""
        ...

    def read(self, entry: EpisodeEntry) -> Episode:
        """One usable episode. Raises UnreadableSample, VideoError, RldsError or CalvinFormatError."""
        ...


class SomethingSomethingSource:
    """Something-Something-v2: <root>/labels/{train,validation}.json, <root>/20bn-something-something-v2/<id>.webm.

    The published test set has no sentences and is left out. Label files of older releases have a prefix in their name.
    Labels and videos may also lie directly in <root>.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        folders = [self.root / name for name in ("20bn-something-something-v2", "videos")]
        self.videos = next((folder for folder in folders if folder.is_dir()), self.root)

    def episodes(self) -> list[EpisodeEntry]:
        """See Source."""
        entries = []
        for split, name in (("train", "train.json"), ("val", "validation.json")):
            files = [path for folder in (self.root / "labels", self.root) for path in sorted(folder.glob(f"*{name}"))]
            for record in _read_json(files[0], list) if files else ():
                if not isinstance(record, dict) or "id" not in record:
                    raise UserError(f"{files[0]}: a record has no id ({str(record)[:80]}); download the labels again")
                text = record.get("label") or ""
                path = str(self.videos / f"{record['id']}.webm")
                entries.append(
                    EpisodeEntry(str(record["id"]), split, None if text.strip() else NO_CAPTION, (path, text))
                )
        return _not_empty(entries, self.root, "labels/train.json or labels/validation.json of Something-Something-v2")

    def read(self, entry: EpisodeEntry) -> Episode:
        """See Source."""
        path, text = entry.key
        return Episode([text], [_video_camera(path)])


class FolderSource:
    """Any folder of videos with a csv or json file of captions, captions.csv or captions.json unless named.

    csv: a column `video` (or file, path, video_path), a column `text` (or caption, label, sentence), and optionally
    `start` and `end` in seconds, `split` and `id`. json: a list of such records, or an object {video: text}.
    """

    def __init__(self, root: str | Path, captions: str | Path | None = None) -> None:
        self.root = Path(root)
        defaults = [self.root / f"captions{suffix}" for suffix in (".csv", ".json")]
        self.captions = Path(captions or next((path for path in defaults if path.is_file()), defaults[0]))

    def episodes(self) -> list[EpisodeEntry]:
        """See Source."""
        entries = [self._entry(number, record) for number, record in enumerate(self._records())]
        return _not_empty(entries, self.root, f"captions in {self.captions}")

    def read(self, entry: EpisodeEntry) -> Episode:
        """See Source."""
        path, text, start, end = entry.key
        return Episode([text], [_video_camera(path, start, end)])

    def _records(self) -> list[dict[str, Any]]:
        if self.captions.suffix == ".csv":
            if not self.captions.is_file():
                raise MissingFileError(f"{self.captions}: no captions; name a csv or json file with source.captions=")
            with self.captions.open(newline="", encoding="utf-8-sig") as stream:
                return list(csv.DictReader(stream))
        content = _read_json(self.captions, (list, dict))
        if isinstance(content, dict):
            return [{"video": name, "text": text} for name, text in content.items()]
        return content

    def _entry(self, number: int, record: Any) -> EpisodeEntry:
        if not isinstance(record, dict):
            raise UserError(f"{self.captions}: record {number} is not an object; write {{video, text}} for each video")
        name = next((record[key] for key in VIDEO_KEYS if record.get(key)), None)
        if not name:
            raise UserError(f"{self.captions}: record {number} names no video; give it one of {', '.join(VIDEO_KEYS)}")
        id = str(record.get("id") or "")
        path = self.root / name
        if not path.resolve().is_relative_to(self.root.resolve()):
            return EpisodeEntry(id or name, reason="path leaves the folder")
        text = str(next((record[key] for key in CAPTION_KEYS if record.get(key)), "")).strip()
        start, end = self._seconds(number, record, "start"), self._seconds(number, record, "end")
        return EpisodeEntry(
            id or f"{Path(name).with_suffix('')}{'' if start is None else f'_{start:g}'}",
            str(record.get("split") or "train"),
            None if text else NO_CAPTION,
            (str(path), text, start, end),
        )

    def _seconds(self, number: int, record: Mapping[str, Any], key: str) -> float | None:
        value = record.get(key)
        try:
            return None if value in (None, "") else float(value)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self.captions}: record {number} has {key}={value!r}; give it in seconds, or leave it empty"
            ) from error


class RldsSource:
    """Robot episodes of an RLDS data set (Bridge, Fractal). Its split `train` stays train, all others become val.

    names: names of the data set, of which the first that lies under `root` is read. images: the feature of every
    camera. text, state: features of the sentence and of the robot's readings. Releases of one data set differ, so each
    feature is a list of names of which the first that exists is read. fps: frames per second.
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
        self.splits = {split: rlds.RldsDataset(self.folder, split) for split in rlds.splits(self.folder)}

    def episodes(self) -> list[EpisodeEntry]:
        """See Source."""
        return [
            EpisodeEntry(f"{split}_{index}", "train" if split == "train" else "val", key=(split, index))
            for split, episodes in self.splits.items()
            for index in range(len(episodes))
        ]

    def read(self, entry: EpisodeEntry) -> Episode:
        """See Source."""
        split, index = entry.key
        episode = self.splits[split][index]
        text = episode.text(_first_feature(episode, self.text)).strip()
        if not text:
            raise FilteredSample(episode.id, NO_CAPTION)
        state = next((episode.values(name) for name in self.state if episode.has(name)), None)
        return Episode([text], [self._camera(episode, _first_feature(episode, image)) for image in self.images], state)

    def _camera(self, episode: rlds.Episode, image: str) -> Camera:
        return Camera(len(episode), self.fps, _batches(len(episode), lambda index: episode.image(image, index)))


class CalvinSource:
    """CALVIN: one episode for every annotated segment, with the static and the gripper camera; the training split.

    The paper evaluates in scene D. Its frames are left out, also from ABCD's training split, where scene_info.npy names
    them, unless `scene_d` asks for them. `val` is then the validation split, which is scene D.
    lang_folder: the folder of the sentences within a split.
    """

    FPS = 30.0

    def __init__(self, root: str | Path, *, scene_d: bool = False, lang_folder: str = "lang_annotations") -> None:
        self.root, self.scene_d, self.lang_folder = Path(root), scene_d, lang_folder

    def episodes(self) -> list[EpisodeEntry]:
        """See Source."""
        entries = []
        for split, name in [("training", "train")] + [("validation", "val")] * self.scene_d:
            folder = self.root / split
            scenes = calvin.read_scenes(folder)
            excluded = [span for scene, span in scenes.items() if scene.upper().endswith("D") and not self.scene_d]
            segments = calvin.read_annotations(folder, calvin.read_recordings(folder), self.lang_folder)
            for number, (segment, _) in enumerate(segments):
                in_scene_d = any(segment.start <= last and segment.end >= first for first, last in excluded)
                key = (split, segment.start, segment.end, segment.text, calvin.scene_of(segment.start, scenes))
                entries.append(EpisodeEntry(f"{name}_{number:06d}", name, SCENE_D if in_scene_d else None, key))
        return entries

    def read(self, entry: EpisodeEntry) -> Episode:
        """See Source."""
        split, start, end, text, scene = entry.key
        folder, length = self.root / split, end - start + 1

        def camera(key: str) -> Camera:
            return Camera(
                length,
                self.FPS,
                _batches(length, lambda index: calvin.read_frame(folder, start + index, [key])[key]),
            )

        state = np.stack(
            [calvin.read_frame(folder, frame, ["robot_obs"])["robot_obs"] for frame in range(start, end + 1)]
        )
        return Episode([text], [camera(key) for key in calvin.KEYS.values()], state, scene)


class Ego4dSource:
    """Ego4D's hand-object benchmark: one episode for every narrated action of fho_main.json.

    Its video is clips/<clip_uid>.mp4, or full_scale/<video_uid>.mp4 where the clip does not exist. It is cut from the
    action's pre frame to its post frame, or from start to end where those are not annotated. Only valid actions of the
    camera wearer are used ("#C C cuts the carrot" -> "cuts the carrot").
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
        content = _read_json(self.root / self.annotations, dict)
        entries, number = [], {}
        intervals = [
            (record.get("video_uid"), interval)
            for record in content.get("videos", [])
            for interval in record.get("annotated_intervals", [])
        ]
        for video_uid, interval in intervals:
            name = str(interval.get("clip_uid") or video_uid)
            path, prefix = self._video_file(interval.get("clip_uid"), video_uid)
            for action in interval.get("narrated_actions") or []:
                number[name] = number.get(name, -1) + 1
                entries.append(self._entry(f"{name}_{number[name]:03d}", path, prefix, action))
        return _not_empty(entries, self.root, f"narrated actions in {self.annotations}")

    def read(self, entry: EpisodeEntry) -> Episode:
        """See Source."""
        path, text, first, last = entry.key
        length, fps, _ = video.probe(path)
        if not 0 <= first <= last < length:
            raise UnreadableSample(
                entry.id, f"is annotated for frames {first} to {last}, but {path} has {length} frames"
            )
        return Episode([text], [Camera(last - first + 1, fps, video.read_batches(path, first, last, BATCH_SIZE))])

    def _video_file(self, clip_uid: str | None, video_uid: str | None) -> tuple[str, str]:
        """The file of an interval, and the prefix of the keys that hold its frame numbers.

        The keys with the prefix "clip_" count from the first frame of the clip, those without from that of the video.
        """
        clip = self.root / self.clips / f"{clip_uid}.mp4"
        whole = self.root / self.videos / f"{video_uid}.mp4"
        return (str(whole), "") if whole.is_file() and not clip.is_file() else (str(clip), "clip_")

    def _entry(self, id: str, path: str, prefix: str, action: dict[str, Any]) -> EpisodeEntry:
        text = str(action.get("narration_text") or "")
        if action.get("is_rejected") or action.get("is_invalid_annotation") or action.get("is_valid_action") is False:
            return EpisodeEntry(id, reason=REJECTED)
        if not self.WEARER.match(text):
            return EpisodeEntry(id, reason=NOT_WEARER if text.strip() else NO_CAPTION)
        sentence = " ".join(self.TAG.sub(" ", self.WEARER.sub("", text)).split()).strip(" .")
        critical = action.get(f"{prefix}critical_frames") or {}
        first, last = (
            action.get(f"{prefix}{edge}_frame") if critical.get(key) is None else critical[key]
            for key, edge in (("pre_frame", "start"), ("post_frame", "end"))
        )
        if first is None or last is None or not sentence:
            return EpisodeEntry(id, reason=NO_CAPTION if not sentence else NO_FRAMES)
        return EpisodeEntry(id, key=(path, sentence, int(first), int(last)))


def _first_feature(episode: rlds.Episode, names: Sequence[str]) -> str:
    found = next((name for name in names if episode.has(name)), None)
    if found is None:
        raise rlds.RldsError(
            f"{episode.id}: has none of the features {', '.join(names)}; name its feature in configs/source"
        )
    return found


def _batches(length: int, read_frame: Callable[[int], np.ndarray]) -> Iterator[np.ndarray]:
    """`length` frames (H, W, 3) as batches (n, H, W, 3)."""
    for start in range(0, length, BATCH_SIZE):
        yield np.stack([read_frame(index) for index in range(start, min(start + BATCH_SIZE, length))])


def _video_camera(path: str, start: float | None = None, end: float | None = None) -> Camera:
    """A video file, or its part between two times in seconds. Raises UnreadableSample and VideoError."""
    length, fps, _ = video.probe(path)
    first = 0 if start is None else round(start * fps)
    last = length if end is None else min(round(end * fps), length)
    if not 0 <= first < last:
        duration = length / fps if fps else 0
        raise UnreadableSample(
            path, f"is asked for from {start} s to {end} s, but is {duration:.1f} s long; correct start and end"
        )
    return Camera(last - first, fps, video.read_batches(path, first, last - 1, BATCH_SIZE))


def _read_json(path: Path, kind: type | tuple[type, ...]) -> Any:
    """The content of a JSON file that holds an instance of `kind`. Raises UserError."""
    if not path.is_file():
        raise MissingFileError(f"{path} is missing; data/README.md shows where every source looks for its files")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(content, kind):
        raise UserError(
            f"{path} holds a {type(content).__name__}, which is not the structure of the published file; "
            "download it again"
        )
    return content


def _not_empty(entries: list[EpisodeEntry], root: Path, what: str) -> list[EpisodeEntry]:
    if not entries:
        raise MissingFileError(f"{root}: found no {what}; data/README.md shows the layout, root= names the folder")
    return entries
