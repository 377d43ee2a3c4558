"""Where pairs of frames and their instruction come from: RLDS, videos, CALVIN's npz (Sec. 3.2, A.2). How they are
drawn: step2_gidm.data.pairs.

A set without a val split of its own holds out every twentieth episode (common.video_set). Where a set does not name its scenes, it counts
as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import calvin_format, human_video, rlds, video_set
from common.errors import MissingFileError, UserError
from common.mixture import FilteredSample, UnreadableSample
from common.video import VideoError, probe, read_frames
from step2_gidm.data.pairs import EpisodeView, FramePair, Transitions


class VideoTransitions(Transitions):
    """A video-set folder: annotation/{split}/<id>.json beside videos (human video, playtable, VPP's sets).

    `view` is the index of a camera, or None to draw one each time. `fps` overrides containers that lie about their rate
    (VPP's Bridge says 3). `fraction` keeps that share of the clips (common.human_video, Fig. 8). `only` names the one split
    on disk to train on and to hold out from (VPP's samples have val alone).
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
        **pairs: Any,
    ) -> None:
        super().__init__(**pairs)
        self.folder, self.fps, self.view = Path(folder), fps, view
        files = video_set.annotations(self.folder / "annotation", split, only_split=only_split)
        place = self.folder / "annotation" / (only_split or ("train" if split == "val" else split))
        if not files and not any(place.glob("*.json")):
            others = sorted({path.parent.name for path in self.folder.glob("annotation/*/*.json")})
            hint = (
                f"there is {' and '.join(others)}: only={others[0]} shares it out"
                if others
                else "a video set holds annotation/train/<id>.json and videos/"
            )
            raise MissingFileError(f"{place}: no json here; {hint}")
        self._unfiltered_length, self.files = len(files), human_video.subset_videos(files, fraction)
        self._probed: dict[Path, tuple[int, float]] = {}

    def __len__(self) -> int:
        return len(self.files)

    @property
    def unfiltered_length(self) -> int:
        """See Transitions."""
        return self._unfiltered_length

    def open_episode(self, index: int, rng: np.random.Generator | None = None) -> EpisodeView:
        """See Transitions. Frames stay in their video: it is small, and seeks are cheap."""
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
    """A folder of CALVIN's npz frames, such as task_ABC_D/training or what playtable records: pairs inside the
    annotated segments.

    `view` is "static", "gripper", or None to draw one each time. The twentieth that is held out are whole recordings,
    where there are
    several.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        *,
        fps: float = 30.0,
        view: str | None = "static",
        lang_folder: str = "lang_annotations",
        **pairs: Any,
    ) -> None:
        super().__init__(**pairs)
        if view is not None and view not in calvin_format.KEYS:
            raise UserError(f"unknown view {view!r}; use {', '.join(calvin_format.KEYS)} or null for any")
        self.folder, self.fps = Path(folder), fps
        self.views = [view] if view else list(calvin_format.KEYS)
        recordings = calvin_format.read_recordings(self.folder)
        self.scenes = calvin_format.read_scenes(self.folder)
        found = calvin_format.read_annotations(self.folder, recordings, lang_folder)
        kept = set(video_set.split_indices(len(recordings) if len(recordings) > 1 else len(found), split).tolist())
        self.segments = [
            note for number, (note, row) in enumerate(found) if (row if len(recordings) > 1 else number) in kept
        ]

    def __len__(self) -> int:
        return len(self.segments)

    def open_episode(self, index: int, rng: np.random.Generator | None = None) -> EpisodeView:
        """See Transitions. Frames stay in their files, one each."""
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
        """(2, 15) the robot's readings."""
        try:
            return np.stack(
                [calvin_format.read_frame(self.folder, frame, ["robot_obs"])["robot_obs"] for frame in frames]
            ).astype(np.float64)
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
    """An RLDS folder. `image` and `text` are paths inside a step, `encoding` is that of the sentence (common.rlds),
    `fps` the control rate.

    Episodes without an instruction are FilteredSample, as UniVLA drops them.
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
        **pairs: Any,
    ) -> None:
        super().__init__(**pairs)
        if encoding not in rlds.ENCODINGS:
            raise UserError(f"unknown encoding {encoding!r} of sentences; use {', '.join(rlds.ENCODINGS)}")
        self.fps, self.image, self.text, self.encoding = fps, image, text, encoding
        own = "val" in rlds.splits(folder)
        self.episodes = rlds.RldsDataset(folder, split if own else "train")
        self.kept = np.arange(len(self.episodes)) if own else video_set.split_indices(len(self.episodes), split)

    def __len__(self) -> int:
        return len(self.kept)

    def open_episode(self, index: int, rng: np.random.Generator | None = None) -> EpisodeView:
        """See Transitions. A record has to be read whole, so its pairs come with the bytes of their images."""
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
            return [
                rlds.decode(frame, f"{self.image} of its {which} frame")
                for frame, which in zip(pair.frames, ("first", "second"))
            ]
        except rlds.RldsError as error:
            raise UnreadableSample(pair.id, str(error)) from error
