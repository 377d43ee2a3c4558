"""Language-labelled CALVIN windows: what the robot sees and is told, and the ten motions that follow (Sec. 4.2, Fig. 4).

Images are opened for the first frame of a window only; the motions of all frames are packed into one array, once.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.calvin_format import KEYS, Annotation, CalvinFormatError, read_annotations, read_frame, read_recordings
from common.files import beside
from common.mixture import Unreadable
from common.video import resize

# The authors' environment D validation set is the benchmark's test world, so held-out recordings of `folder` validate instead.
SPLITS = ("train", "val", "all")


class CalvinWindows:
    """A sample set of windows: frame t of every view, its sentence, and `rel_actions[t : t + horizon]`.

    A window starts at every `frame_stride`-th annotated frame and may leave its annotation by at most `max_pad` motions.
    Those become no motion (zeros, the last gripper command kept): what follows in the recording belongs to another
    sentence. `fraction` keeps a share of whole recordings (Fig. 4); smaller shares lie inside larger ones, and the
    `holdout` share of the "val" split is the same for all of them.

    With `pack`, images are resized once into one uint8 file per view; without, one npz is opened per sample.
    `future_frames` names frames that the forward model imagines, `future_stride` control steps apart: the true ones come along. A
    count n stands for the whole clip, 1..n-1. Frames past a recording's end repeat its last frame, as in step 1.
    """

    def __init__(self, root: str | Path, split: str = "train", *, folder: str = "training", lang_folder: str = "lang_annotations",
                 horizon: int = 10, views: Sequence[str] = ("static", "gripper"), image_size: int = 256, fraction: float = 1.0,
                 holdout: float = 0.02, frame_stride: int = 1, max_pad: int = 0, pack: bool = False,
                 future_frames: Sequence[int] | int = (), future_stride: int = 1, cache_dir: str | Path | None = None, seed: int = 0) -> None:
        if split not in SPLITS or not 0 < fraction <= 1 or not 0 <= max_pad < horizon:
            raise ValueError(f"CalvinWindows: split {split!r} of {SPLITS}, fraction {fraction} in (0, 1], max_pad {max_pad} in 0..{horizon - 1}")
        unknown = sorted(set(views) - KEYS.keys())
        if unknown or not views:
            raise ValueError(f"CalvinWindows: unknown views {unknown}; views: {sorted(KEYS)}")
        self.folder, self.horizon, self.views, self.image_size = Path(root) / folder, horizon, tuple(views), image_size
        frames = range(1, future_frames) if isinstance(future_frames, int) else future_frames
        self.future_offsets = tuple(frame * future_stride for frame in frames)
        self.recordings = read_recordings(self.folder)
        found = read_annotations(self.folder, self.recordings, lang_folder)
        kept = set(choose_recordings(len(self.recordings), split, fraction=fraction, holdout=holdout, seed=seed))
        self.annotations = [annotation for annotation, row in found if row in kept]
        self.windows = _windows(self.annotations, horizon - max_pad, frame_stride)  # (W, 2): annotation, frame
        if not len(self.windows):
            raise ValueError(f"{self.folder}: no window of {horizon} motions in the {split!r} split ({len(self.annotations)} annotations)")
        frames = [np.arange(annotation.start, annotation.end + 1) for annotation, _ in found]
        self._store = FrameStore(self.folder, np.unique(np.concatenate(frames)), cache_dir)
        self.actions = self._store.actions()
        shown = np.unique(np.concatenate([self.windows[:, 1]] + [self._future_frame(self.windows[:, 1], k) for k in self.future_offsets]))
        self._images = self._store.images(self.views, image_size, shown) if pack else None

    def __len__(self) -> int:
        return len(self.windows)

    def text(self, index: int) -> str:
        """The sentence of a window."""
        return self.annotations[self.windows[index, 0]].text

    def chunk(self, index: int) -> Tensor:
        """(horizon, 7) motions of a window, padded after its annotation's end."""
        annotation, frame = self.annotations[self.windows[index, 0]], int(self.windows[index, 1])
        row = self._store.row(frame)
        actions = self.actions[row:row + min(self.horizon, annotation.end + 1 - frame)]
        rest = np.zeros((self.horizon - len(actions), 7), np.float32)
        rest[:, 6] = actions[-1, 6]
        return torch.from_numpy(np.concatenate([actions, rest]))

    def images(self, frame: int) -> dict[str, Tensor]:
        """View name -> (3, S, S) in [-1, 1]."""
        if self._images is not None:
            return {view: images.frame(frame) for view, images in self._images.items()}
        arrays = read_frame(self.folder, frame, [KEYS[view] for view in self.views])
        return {view: resize(arrays[KEYS[view]][None], self.image_size)[0] * 2 - 1 for view in self.views}

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """One window as a sample of contracts.PolicyBatch; `rng` is not used."""
        frame = int(self.windows[index, 1])
        try:
            sample = {"id": self.id(index), "views": self.images(frame), "text": self.text(index), "actions": self.chunk(index)}
            if self.future_offsets:
                steps = [self.images(int(self._future_frame(frame, offset))) for offset in self.future_offsets]
                sample["futures"] = {view: torch.stack([step[view] for step in steps]) for view in self.views}
        except CalvinFormatError as error:
            raise Unreadable(self.id(index), str(error)) from error
        return sample

    def id(self, index: int) -> str:
        """A window's name in reports."""
        return f"{self.folder.parent.name}/{self.folder.name}/{int(self.windows[index, 1]):07d}"

    def fingerprint(self) -> str:
        """A hash of which frames and sentences the windows are, for caches."""
        digest = hashlib.sha256(repr((str(self.folder.resolve()), self.views, self.image_size, self.future_offsets)).encode())
        digest.update(self.windows.tobytes())
        digest.update(repr([annotation.text for annotation in self.annotations]).encode())
        digest.update(np.ascontiguousarray(self.actions).tobytes())
        return digest.hexdigest()

    def _future_frame(self, frame: int | np.ndarray, offset: int) -> np.ndarray:
        row = np.searchsorted(self.recordings[:, 0], frame, side="right") - 1
        return np.minimum(np.asarray(frame) + offset, self.recordings[row, 1])


def choose_recordings(count: int, split: str, *, fraction: float, holdout: float, seed: int) -> list[int]:
    """Rows of the recordings of a split: one seeded order, validation from its end, nested shares from its beginning."""
    order = np.random.default_rng(seed).permutation(count)
    held = 0 if split == "all" or holdout <= 0 else max(1, round(holdout * count))
    if held >= count:
        raise ValueError(f"{count} recordings cannot be split into training and validation; use split=all")
    if split == "val":
        return sorted(order[count - held:].tolist())
    return sorted(order[:max(1, round(fraction * (count - held)))].tolist())


def _windows(annotations: list[Annotation], least: int, stride: int) -> np.ndarray:
    """(W, 2) annotation numbers and first frames; at least `least` motions lie inside the annotation."""
    rows = [(number, frame) for number, a in enumerate(annotations) for frame in range(a.start, a.end + 2 - least, stride)]
    return np.array(rows, np.int64).reshape(-1, 2)


class FrameStore:
    """Per-frame arrays of a dataset folder, packed once into plain .npy files beside it (or in `cache_dir`)."""

    def __init__(self, folder: Path, frames: np.ndarray, cache_dir: str | Path | None = None) -> None:
        self.folder, self.frames = folder, frames
        self.cache = Path(cache_dir) if cache_dir else folder / ".defi_cache"

    def row(self, frame: int) -> int:
        """Where a frame lies in the packed arrays. Frames of one annotation lie side by side."""
        return int(np.searchsorted(self.frames, frame))

    def actions(self) -> np.ndarray:
        """(N, 7) float32 relative actions of all annotated frames."""
        def read(frame: int) -> np.ndarray:
            action = read_frame(self.folder, frame, ["rel_actions"])["rel_actions"]
            if action.shape != (7,) or not np.isfinite(action).all():
                raise CalvinFormatError(f"{self.folder}, frame {frame}: rel_actions has shape {action.shape}, expected 7 finite numbers")
            return action.astype(np.float32)
        return np.array(self._pack("actions", self.frames, (7,), np.float32, read))

    def images(self, views: Sequence[str], size: int, frames: np.ndarray) -> dict[str, PackedImages]:
        """View name -> frames resized to (N, size, size, 3) uint8."""
        packed = {}
        for view in views:
            def read(frame: int, key: str = KEYS[view]) -> np.ndarray:
                image = resize(read_frame(self.folder, frame, [key])[key][None], size)[0]
                return (image * 255).round().byte().permute(1, 2, 0).numpy()
            packed[view] = PackedImages(frames, self._pack(f"{KEYS[view]}_{size}", frames, (size, size, 3), np.uint8, read))
        return packed

    def _pack(self, name: str, frames: np.ndarray, shape: tuple[int, ...], dtype: type, read: Any) -> np.ndarray:
        key = hashlib.sha256(repr((str(self.folder.resolve()), name)).encode() + frames.tobytes() + self._stamp().encode()).hexdigest()[:16]
        path = self.cache / f"{name}-{key}.npy"
        if not path.is_file():
            with beside(path) as part:
                array = np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=(len(frames), *shape))
                for row, frame in enumerate(tqdm(frames.tolist(), desc=f"pack {name}", unit="frame", mininterval=1)):
                    array[row] = read(frame)
                array.flush()
        return np.load(path, mmap_mode="r")

    def _stamp(self) -> str:
        """Changes when the dataset is recorded anew under the same path."""
        status = (self.folder / "ep_start_end_ids.npy").stat()
        return f"{status.st_mtime_ns}-{status.st_size}"


class PackedImages:
    """Images by frame number."""

    def __init__(self, frames: np.ndarray, pixels: np.ndarray) -> None:
        self.frames, self.pixels = frames, pixels

    def frame(self, frame: int) -> Tensor:
        """(3, S, S) in [-1, 1]."""
        pixels = np.array(self.pixels[int(np.searchsorted(self.frames, frame))])
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
