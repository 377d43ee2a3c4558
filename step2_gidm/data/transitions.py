"""The sources of transitions: video sets, CALVIN's npz files and RLDS (Sec. 3.2, A.2).

How pairs are drawn from them stands in step2_gidm.data.pairs. A set without a val split of its own holds out every
twentieth episode (common.video_set). A set that does not name its scenes counts as one scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import calvin_format, human_video, rlds, video_set
from common.errors import FilteredSample, MissingFileError, UnreadableSample, UserError
from common.video import VideoError, probe, read_frames
from step2_gidm.data.pairs import EpisodeView, FramePair, Transitions


class VideoTransitions(Transitions):
    """A video set in the format of common.video_set: human video, playtable, and the sets that VPP published.

    Args:
        folder: the set.
        split: "train" or "val".
        fps: frames per second, where the containers state a wrong rate (3 in VPP's Bridge).
        view: index of a camera, or None to draw one for each pair.
        fraction: fraction of the clips that is kept (common.human_video, Fig. 8).
        only_split: the only split that is on disk; it is divided into train and val (VPP's samples have val alone).
        options: those of Transitions.

    Raises MissingFileError where there are no annotations.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        *,
        fps: float | None = None,
        view: int | None = 0,
        fraction: float = 1.0,
        only_split: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.folder, self.fps, self.view = Path(folder), fps, view
        files = video_set.annotations(self.folder / "annotation", split, only_split=only_split)
        place = self.folder / "annotation" / (only_split or ("train" if split == "val" else split))
        if not files and not any(place.glob("*.json")):
            others = sorted({path.parent.name for path in self.folder.glob("annotation/*/*.json")})
            hint = (
                f"there is {' and '.join(others)}, which only_split={others[0]} divides into train and val"
                if others
                else "a video set holds annotation/train/<id>.json and videos/"
            )
            raise MissingFileError(f"{place}: there are no .json files here; {hint}")
        self._unfiltered_length, self.files = len(files), human_video.subset_videos(files, fraction)
        self._probed: dict[Path, tuple[int, float]] = {}

    def __len__(self) -> int:
        return len(self.files)

    @property
    def unfiltered_length(self) -> int:
        """See Transitions."""
        return self._unfiltered_length

    def open_episode(self, index: int, rng: np.random.Generator | None = None) -> EpisodeView:
        """See Transitions. A pair holds the path of its video, because seeking in it is cheap."""
        file = self.files[index]
        id = f"{self.folder.name}/{file.stem}"
        record = video_set.read_annotation(file)
        text, states, scene = record["texts"][0], record.get("state") or [], str(record.get("scene") or "")
        if not text.strip():
            raise FilteredSample(id, f"{file} has an empty sentence")
        cameras = video_set.num_cameras(file, record)
        view = self.view if self.view is not None else int(rng.integers(cameras)) if rng else 0
        path = video_set.video_path(self.folder, file, record, view)
        length, fps = self._probe(id, path)
        if self.labelled and states and len(states) != length:
            raise UnreadableSample(id, f"{len(states)} readings of the robot for {length} frames")

        def pair(start: int, end: int) -> FramePair:
            metadata = self.metadata(str(file), scene or str(self.folder), view, start, length)
            if metadata and states:
                metadata["state"] = np.asarray([states[start], states[end]], np.float64)
            return FramePair(f"{id}/{view}@{start}+{end - start}", text, (path, start, end), metadata=metadata)

        return EpisodeView(id, length, fps, pair)

    def _probe(self, id: str, path: Path) -> tuple[int, float]:
        """Number of frames and frames per second of a video, from its container or from `fps`."""
        try:
            if path not in self._probed:
                self._probed[path] = probe(path)[:2]
        except VideoError as error:
            raise UnreadableSample(id, str(error)) from error
        length, rate = self._probed[path]
        return length, self.fps or rate

    def decode(self, pair: FramePair) -> Sequence[np.ndarray]:
        """See Transitions."""
        path, start, end = pair.frames
        try:
            return read_frames(path, [start, end])
        except VideoError as error:
            raise UnreadableSample(pair.id, str(error)) from error


class CalvinTransitions(Transitions):
    """A folder of CALVIN's npz frames, such as task_ABC_D/training or a recording of playtable.

    Pairs lie inside the annotated segments. Whole recordings are held out where there are several, else annotations.

    Args:
        folder: the folder with the frames.
        split: "train" or "val".
        fps: frames per second.
        view: "static", "gripper", or None to draw one for each pair.
        lang_folder: name of the folder with the annotations.
        options: those of Transitions.

    Raises UserError for an unknown view and CalvinFormatError where the folder is not in CALVIN's format.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        *,
        fps: float = 30.0,
        view: str | None = "static",
        lang_folder: str = "lang_annotations",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if view is not None and view not in calvin_format.KEYS:
            raise UserError(f"unknown view {view!r}; use {', '.join(calvin_format.KEYS)}, or null for any of them")
        self.folder, self.fps = Path(folder), fps
        self.views = [view] if view else list(calvin_format.KEYS)
        recordings = calvin_format.read_recordings(self.folder)
        self.scenes = calvin_format.read_scenes(self.folder)
        found = calvin_format.read_annotations(self.folder, recordings, lang_folder)
        by_recording = len(recordings) > 1
        kept = set(video_set.split_indices(len(recordings) if by_recording else len(found), split).tolist())
        self.segments = [
            note for number, (note, recording) in enumerate(found) if (recording if by_recording else number) in kept
        ]

    def __len__(self) -> int:
        return len(self.segments)

    def open_episode(self, index: int, rng: np.random.Generator | None = None) -> EpisodeView:
        """See Transitions. A pair holds the numbers of its frames, each of which is a file."""
        note = self.segments[index]
        view = self.views[int(rng.integers(len(self.views))) if rng else 0]
        name = f"{self.folder.parent.name}/{self.folder.name}"
        id, length = f"{name}/{note.start:07d}-{note.end:07d}", note.end - note.start + 1
        if not note.text.strip():
            raise FilteredSample(id, "an annotation without a sentence")

        def pair(start: int, end: int) -> FramePair:
            frames = note.start + start, note.start + end
            scene = calvin_format.scene_of(frames[0], self.scenes) or str(self.folder)
            metadata = self.metadata(id, scene, view, start, length)
            if metadata:
                metadata["state"] = self._states(id, frames)
            return FramePair(
                f"{name}/{frames[0]:07d}/{view}+{end - start}",
                note.text,
                (*frames, calvin_format.KEYS[view]),
                metadata=metadata,
            )

        return EpisodeView(id, length, self.fps, pair)

    def _states(self, id: str, frames: Sequence[int]) -> np.ndarray:
        """The robot's readings at both frames, (2, 15)."""
        try:
            states = [calvin_format.read_frame(self.folder, frame, ["robot_obs"])["robot_obs"] for frame in frames]
            return np.stack(states).astype(np.float64)
        except calvin_format.CalvinFormatError as error:
            raise UnreadableSample(id, str(error)) from error

    def decode(self, pair: FramePair) -> Sequence[np.ndarray]:
        """See Transitions."""
        *frames, key = pair.frames
        try:
            images = [calvin_format.read_frame(self.folder, frame, [key])[key] for frame in frames]
            return [rlds.decode(image, f"{pair.id}: {key}") for image in images]
        except (calvin_format.CalvinFormatError, rlds.RldsError) as error:
            raise UnreadableSample(pair.id, str(error)) from error


class RldsTransitions(Transitions):
    """A data set in RLDS format. Episodes without an instruction are left out, as in UniVLA.

    Args:
        folder: the folder of one version of the set.
        split: "train" or "val".
        fps: control steps per second.
        image: path of the camera image inside a step.
        text: path of the sentence inside a step.
        encoding: of the sentence, one of common.rlds.ENCODINGS.
        options: those of Transitions.

    Raises UserError for an unknown encoding and RldsError where the folder is not in RLDS format.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        *,
        fps: float,
        image: str = "observation/image",
        text: str = "language_instruction",
        encoding: str = "text",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if encoding not in rlds.ENCODINGS:
            raise UserError(f"unknown encoding {encoding!r} of sentences; use {', '.join(rlds.ENCODINGS)}")
        self.fps, self.image, self.text, self.encoding = fps, image, text, encoding
        own = "val" in rlds.splits(folder)
        self.episodes = rlds.RldsDataset(folder, split if own else "train")
        self.kept = np.arange(len(self.episodes)) if own else video_set.split_indices(len(self.episodes), split)

    def __len__(self) -> int:
        return len(self.kept)

    def open_episode(self, index: int, rng: np.random.Generator | None = None) -> EpisodeView:
        """See Transitions. A record can only be read whole, so a pair holds its encoded images."""
        name = f"{self.episodes.name}/{self.kept[index]}"
        try:
            episode = self.episodes[int(self.kept[index])]
        except rlds.RldsError as error:
            raise UnreadableSample(name, str(error)) from error

        def pair(start: int, end: int) -> FramePair:
            try:
                text = episode.text(self.text, start, self.encoding)
                frames = tuple(episode.encoded(self.image, i) for i in (start, end))
            except rlds.RldsError as error:
                raise UnreadableSample(name, str(error)) from error
            if not text.strip():
                raise FilteredSample(name, f"no instruction under {self.text}")
            size = sum(frame.nbytes if isinstance(frame, np.ndarray) else len(frame) for frame in frames)
            metadata = self.metadata(name, str(self.episodes.folder), 0, start, len(episode))
            return FramePair(f"{name}@{start}+{end - start}", text, frames, size, metadata)

        return EpisodeView(name, len(episode), self.fps, pair)

    def decode(self, pair: FramePair) -> Sequence[np.ndarray]:
        """See Transitions."""
        try:
            first, second = pair.frames
            return [
                rlds.decode(first, f"{self.image} of its first frame"),
                rlds.decode(second, f"{self.image} of its second frame"),
            ]
        except rlds.RldsError as error:
            raise UnreadableSample(pair.id, str(error)) from error
