"""Language-labelled windows of CALVIN: pictures and a sentence, and the ten actions that follow (Sec. 4.2, Fig. 4).

Pictures are read for the first frame of a window, and for future frames where they are asked for. The actions of all
frames are read into one array when the dataset is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.calvin_format import KEYS, Annotation, CalvinFormatError, read_annotations, read_frame, read_recordings
from common.errors import UnreadableSample, UserError
from common.image_range import normalize
from common.video import resize
from step3_defi.data import store

# The official validation set of environment D is the test world of the benchmark, so recordings held out of `folder`
# validate instead.
SPLITS = ("train", "val", "all")


class CalvinWindows:
    """A sample set of windows: the pictures of frame t, its sentence, and `rel_actions[t : t + horizon]`.

    Windows. A window starts at every `frame_stride`-th frame of an annotation. It may exceed its annotation by at most
    `max_pad` actions, which become zeros with the last gripper command, because the frames that follow belong to
    another sentence. `min_window` is the least number of actions from the start of a window to the end of its
    annotation; by default it is horizon - max_pad.

    Splits. `val_fraction` of the recordings form the split "val". `fraction` keeps a share of the other, whole
    recordings for training (Fig. 4); smaller shares are contained in larger ones, and "val" is the same for all. With
    `val_folder`, that folder is the split "val" as a whole, for datasets of too few recordings.

    Future frames. The forward model imagines frames that lie `future_stride` control steps apart. Samples hold the
    true frames number `future_frames`, unless `load_future_frames` is 0; a number n stands for the whole clip, 1..n-1.
    Frames after the end of a recording repeat its last frame, as in step 1.

    Reading. With `pack`, `workers` processes first pack the frames that all splits need (step3_defi.data.store).
    Without it, a pack is used where there is one, and else one npz file is opened per picture. All give equal pixels.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        folder: str = "training",
        lang_folder: str = "lang_annotations",
        horizon: int = 10,
        views: Sequence[str] = ("static", "gripper"),
        image_size: int = 256,
        fraction: float = 1.0,
        val_fraction: float = 0.02,
        frame_stride: int = 1,
        max_pad: int = 0,
        min_window: int | None = None,
        pack: bool = False,
        workers: int = 1,
        future_frames: Sequence[int] | int = (),
        load_future_frames: float = True,
        future_stride: int = 1,
        val_folder: str | None = None,
        cache_dir: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if split not in SPLITS or not 0 < fraction <= 1 or not 0 <= max_pad < horizon:
            raise UserError(
                f"CalvinWindows: split={split!r}, fraction={fraction}, max_pad={max_pad}; choose a split of {SPLITS}, "
                f"a fraction above 0 and at most 1, and max_pad in 0..{horizon - 1}"
            )
        least = horizon - max_pad if min_window is None else min_window
        if least < horizon - max_pad:
            raise UserError(
                f"CalvinWindows: with min_window={min_window}, windows of {horizon} actions exceed their annotation by "
                f"more than max_pad={max_pad}; set min_window to at least {horizon - max_pad}"
            )
        unknown = sorted(set(views) - KEYS.keys())
        if unknown or not views:
            raise UserError(f"CalvinWindows: views={list(views)}; choose one or more of {sorted(KEYS)}")
        if split == "val" and val_folder:
            folder, split = val_folder, "all"
        self.folder, self.horizon, self.views, self.image_size = Path(root) / folder, horizon, tuple(views), image_size
        if not load_future_frames:
            future_frames = ()
        elif isinstance(future_frames, int):
            future_frames = range(1, future_frames)
        self.keys = [KEYS[view] for view in views]
        self.future_offsets = tuple(frame * future_stride for frame in future_frames)
        self.recordings = read_recordings(self.folder)
        found = read_annotations(self.folder, self.recordings, lang_folder)
        kept = set(
            split_recordings(len(self.recordings), split, fraction=fraction, val_fraction=val_fraction, seed=seed)
        )
        self.annotations = [annotation for annotation, row in found if row in kept]
        self.windows = _windows(self.annotations, least, frame_stride)  # (W, 2): annotation, frame
        if not len(self.windows):
            raise UserError(
                f"{self.folder}: no window of {least} actions in the split {split!r}, which has "
                f"{len(self.annotations)} annotations"
            )
        self.frames = np.unique(
            np.concatenate([np.arange(annotation.start, annotation.end + 1) for annotation, _ in found])
        )
        cache = Path(cache_dir) if cache_dir else self.folder / ".defi_cache"
        if pack:
            everything = _windows([annotation for annotation, _ in found], least, frame_stride)
            self.pack = store.get_or_build_pack(
                self.folder, self.frames, self._image_frames(everything), self.keys, cache, workers=workers
            )
        else:
            self.pack = store.find_pack(self.folder, self.frames, self._image_frames(self.windows), self.keys, cache)
        with_actions = self.pack or store.get_or_build_pack(
            self.folder, self.frames, self.frames[:0], [], cache, workers=workers
        )
        self.actions = with_actions.read_actions(self.frames)  # (N, 7) float32, of all annotated frames

    def __len__(self) -> int:
        return len(self.windows)

    def text(self, index: int) -> str:
        """The sentence of a window."""
        return self.annotations[self.windows[index, 0]].text

    def action_chunk(self, index: int) -> Tensor:
        """The (horizon, 7) actions of a window, padded after the end of its annotation."""
        annotation, frame = self.annotations[self.windows[index, 0]], int(self.windows[index, 1])
        row = int(np.searchsorted(self.frames, frame))  # the frames of an annotation are adjacent rows
        actions = self.actions[row : row + min(self.horizon, annotation.end + 1 - frame)]
        rest = np.zeros((self.horizon - len(actions), 7), np.float32)
        rest[:, 6] = actions[-1, 6]
        return torch.from_numpy(np.concatenate([actions, rest]))

    def images(self, frame: int) -> dict[str, Tensor]:
        """View name -> the picture of a frame, (3, S, S) in [-1, 1]."""
        arrays = self.pack.read_images(frame, self.keys) if self.pack else read_frame(self.folder, frame, self.keys)
        return {view: normalize(resize(arrays[KEYS[view]][None], self.image_size)[0]) for view in self.views}

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """A window as one sample of contracts.PolicyBatch; `rng` is not used."""
        frame = int(self.windows[index, 1])
        try:
            sample = {
                "id": self.id(index),
                "views": self.images(frame),
                "text": self.text(index),
                "actions": self.action_chunk(index),
            }
            if self.future_offsets:
                steps = [self.images(int(self._future_frame(frame, offset))) for offset in self.future_offsets]
                sample["futures"] = {view: torch.stack([step[view] for step in steps]) for view in self.views}
        except CalvinFormatError as error:
            raise UnreadableSample(self.id(index), str(error)) from error
        return sample

    def id(self, index: int) -> str:
        """The name of a window in reports, such as "task_D_D/training/0000105"."""
        return f"{self.folder.parent.name}/{self.folder.name}/{int(self.windows[index, 1]):07d}"

    def fingerprint(self) -> str:
        """A hash of what the samples hold (dataset, views, frames, sentences, actions), for caches."""
        digest = hashlib.sha256(
            repr((str(self.folder.resolve()), self.views, self.image_size, self.future_offsets)).encode()
        )
        digest.update(self.windows.tobytes())
        digest.update(repr([annotation.text for annotation in self.annotations]).encode())
        digest.update(np.ascontiguousarray(self.actions).tobytes())
        return digest.hexdigest()

    def _image_frames(self, windows: np.ndarray) -> np.ndarray:
        """The sorted numbers of the frames whose pictures the windows need."""
        return np.unique(
            np.concatenate(
                [windows[:, 1]] + [self._future_frame(windows[:, 1], offset) for offset in self.future_offsets]
            )
        )

    def _future_frame(self, frame: int | np.ndarray, offset: int) -> np.ndarray:
        """The frame `offset` control steps after `frame`, or the last one of its recording."""
        row = np.searchsorted(self.recordings[:, 0], frame, side="right") - 1
        return np.minimum(np.asarray(frame) + offset, self.recordings[row, 1])


def split_recordings(count: int, split: str, *, fraction: float, val_fraction: float, seed: int) -> list[int]:
    """Rows of the recordings of a split, sorted.

    The recordings are shuffled with the seed. Validation takes them from the end, and training from the beginning, so
    that smaller fractions are contained in larger ones.
    """
    order = np.random.default_rng(seed).permutation(count)
    held = 0 if split == "all" or val_fraction <= 0 else max(1, round(val_fraction * count))
    if held >= count:
        raise UserError(f"{count} recordings cannot be split into training and validation; use split=all")
    if split == "val":
        return sorted(order[count - held :].tolist())
    return sorted(order[: max(1, round(fraction * (count - held)))].tolist())


def _windows(annotations: list[Annotation], least: int, stride: int) -> np.ndarray:
    """(W, 2): number of the annotation and first frame, with at least `least` actions inside the annotation."""
    rows = [
        (number, frame) for number, a in enumerate(annotations) for frame in range(a.start, a.end + 2 - least, stride)
    ]
    return np.array(rows, np.int64).reshape(-1, 2)
