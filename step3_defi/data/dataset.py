"""Language-labelled CALVIN windows: what the robot sees and is told, and the ten motions that follow (Sec. 4.2, Fig.
4).

Images are opened for the first frame of a window only; the motions of all frames are read into one array, once.
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
from common.mixture import UnreadableSample
from common.video import resize
from step3_defi.data import store

# The authors' environment D validation set is the benchmark's test world, so held-out recordings of `folder` validate
# instead.
SPLITS = ("train", "val", "all")


class CalvinWindows:
    """A sample set of windows: frame t of every view, its sentence, and `rel_actions[t : t + horizon]`.

    A window starts at every `frame_stride`-th annotated frame and may leave its annotation by at most `max_pad`
    motions.
    Those become no motion (zeros, the last gripper command kept): what follows in the recording belongs to another
    sentence. `min_window` asks for more motions up to the annotation's end than that. `fraction` keeps a share of whole
    recordings (Fig. 4); smaller shares lie inside larger ones, and the `holdout` share of the "val" split is the same
    for
    all of them.

    With `pack`, the pictures of all splits are packed by `workers` processes (store.py; python -m step3_defi.pack does
    nothing else);
    without, one npz is opened per sample, unless a pack is there. Both give the same pixels.
    `future_frames` names frames that the forward model imagines, `future_stride` control steps apart: the true ones
    come along unless
    `load_future_frames` is 0. A count n stands for the whole clip, 1..n-1. Frames past a recording's end repeat its last
    frame, as in step 1. `val_folder` is
    read whole as the "val" split where `folder` has too few recordings to hold some out.
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
            raise ValueError(
                f"CalvinWindows: split {split!r} of {SPLITS}, fraction {fraction} in (0, 1], max_pad {max_pad} in "
                f"0..{horizon - 1}"
            )
        least = horizon - max_pad if min_window is None else min_window
        if least < horizon - max_pad:
            raise ValueError(
                f"CalvinWindows: min_window {min_window} leaves the annotation by more than max_pad {max_pad} of "
                f"{horizon} motions; "
                f"min_window is at least {horizon - max_pad}"
            )
        unknown = sorted(set(views) - KEYS.keys())
        if unknown or not views:
            raise ValueError(f"CalvinWindows: unknown views {unknown}; views: {sorted(KEYS)}")
        if split == "val" and val_folder:
            folder, split = val_folder, "all"
        self.folder, self.horizon, self.views, self.image_size = Path(root) / folder, horizon, tuple(views), image_size
        frames = (
            () if not load_future_frames else range(1, future_frames) if isinstance(future_frames, int) else future_frames
        )
        self.keys, self.future_offsets = (
            [KEYS[view] for view in views],
            tuple(frame * future_stride for frame in frames),
        )
        self.recordings = read_recordings(self.folder)
        found = read_annotations(self.folder, self.recordings, lang_folder)
        kept = set(split_recordings(len(self.recordings), split, fraction=fraction, val_fraction=val_fraction, seed=seed))
        self.annotations = [annotation for annotation, row in found if row in kept]
        self.windows = _windows(self.annotations, least, frame_stride)  # (W, 2): annotation, frame
        if not len(self.windows):
            raise ValueError(
                f"{self.folder}: no window of {least} motions in the {split!r} split ({len(self.annotations)} "
                "annotations)"
            )
        self.frames = np.unique(
            np.concatenate([np.arange(annotation.start, annotation.end + 1) for annotation, _ in found])
        )
        everything = _windows([annotation for annotation, _ in found], least, frame_stride)
        cache = Path(cache_dir) if cache_dir else self.folder / ".defi_cache"
        if pack:
            self.pack = store.packed(
                self.folder, self.frames, self._image_frames(everything), self.keys, cache, workers=workers
            )
        else:
            self.pack = store.find(self.folder, self.frames, self._image_frames(self.windows), self.keys, cache)
        motions = self.pack or store.packed(self.folder, self.frames, self.frames[:0], [], cache, workers=workers)
        self.actions = motions.read_actions(self.frames)  # (N, 7) float32, of all annotated frames

    def __len__(self) -> int:
        return len(self.windows)

    def text(self, index: int) -> str:
        """The sentence of a window."""
        return self.annotations[self.windows[index, 0]].text

    def action_chunk(self, index: int) -> Tensor:
        """(horizon, 7) motions of a window, padded after its annotation's end."""
        annotation, frame = self.annotations[self.windows[index, 0]], int(self.windows[index, 1])
        row = int(np.searchsorted(self.frames, frame))  # frames of one annotation lie side by side
        actions = self.actions[row : row + min(self.horizon, annotation.end + 1 - frame)]
        rest = np.zeros((self.horizon - len(actions), 7), np.float32)
        rest[:, 6] = actions[-1, 6]
        return torch.from_numpy(np.concatenate([actions, rest]))

    def images(self, frame: int) -> dict[str, Tensor]:
        """View name -> (3, S, S) in [-1, 1]."""
        arrays = self.pack.read_images(frame, self.keys) if self.pack else read_frame(self.folder, frame, self.keys)
        return {view: resize(arrays[KEYS[view]][None], self.image_size)[0] * 2 - 1 for view in self.views}

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """One window as a sample of contracts.PolicyBatch; `rng` is not used."""
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
        """A window's name in reports."""
        return f"{self.folder.parent.name}/{self.folder.name}/{int(self.windows[index, 1]):07d}"

    def fingerprint(self) -> str:
        """A hash of which frames and sentences the windows are, for caches."""
        digest = hashlib.sha256(
            repr((str(self.folder.resolve()), self.views, self.image_size, self.future_offsets)).encode()
        )
        digest.update(self.windows.tobytes())
        digest.update(repr([annotation.text for annotation in self.annotations]).encode())
        digest.update(np.ascontiguousarray(self.actions).tobytes())
        return digest.hexdigest()

    def _image_frames(self, windows: np.ndarray) -> np.ndarray:
        """Frames whose pictures windows ask for, sorted."""
        return np.unique(
            np.concatenate(
                [windows[:, 1]] + [self._future_frame(windows[:, 1], offset) for offset in self.future_offsets]
            )
        )

    def _future_frame(self, frame: int | np.ndarray, offset: int) -> np.ndarray:
        row = np.searchsorted(self.recordings[:, 0], frame, side="right") - 1
        return np.minimum(np.asarray(frame) + offset, self.recordings[row, 1])


def split_recordings(count: int, split: str, *, fraction: float, val_fraction: float, seed: int) -> list[int]:
    """Rows of the recordings of a split: one seeded order, validation from its end, nested shares from its
    beginning."""
    order = np.random.default_rng(seed).permutation(count)
    held = 0 if split == "all" or val_fraction <= 0 else max(1, round(val_fraction * count))
    if held >= count:
        raise ValueError(f"{count} recordings cannot be split into training and validation; use split=all")
    if split == "val":
        return sorted(order[count - held :].tolist())
    return sorted(order[: max(1, round(fraction * (count - held)))].tolist())


def _windows(annotations: list[Annotation], least: int, stride: int) -> np.ndarray:
    """(W, 2) annotation numbers and first frames; at least `least` motions lie inside the annotation."""
    rows = [
        (number, frame) for number, a in enumerate(annotations) for frame in range(a.start, a.end + 2 - least, stride)
    ]
    return np.array(rows, np.int64).reshape(-1, 2)
