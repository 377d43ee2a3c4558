"""Reading, resizing and writing video, with decord first and PyAV where decord fails (AV1, unusual containers)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import decord
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from common.files import atomic_path


class VideoError(UserError):
    """A video cannot be read."""


def read_frames(path: str | Path, indices: Sequence[int] | None = None) -> np.ndarray:
    """All frames of a video, or those at `indices`, as (T, H, W, 3) uint8 RGB. Raises VideoError."""
    path = _existing(path)
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        return reader.get_batch(_wanted(path, indices, len(reader))).asnumpy()
    except (decord.DECORDError, RuntimeError):
        return _decode_with_av(path, indices)


def read_batches(path: str | Path, first: int, last: int, size: int) -> Iterator[np.ndarray]:
    """Frames `first` to `last` inclusive, in arrays of `size` frames; the file is opened once. Raises VideoError."""
    path = _existing(path)
    starts = range(first, last + 1, size)
    yielded = 0
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        for start in starts:
            frames = reader.get_batch(_wanted(path, range(start, min(start + size, last + 1)), len(reader))).asnumpy()
            yielded += 1
            yield frames
    except (decord.DECORDError, RuntimeError):
        rest = _decode_with_av(path, range(starts[yielded], last + 1))
        yield from (rest[start : start + size] for start in range(0, len(rest), size))


def probe(path: str | Path) -> tuple[int, float, tuple[int, int]]:
    """(number of frames, frames per second, (height, width)). Raises VideoError."""
    path = _existing(path)
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        return len(reader), float(reader.get_avg_fps()), tuple(reader[0].shape[:2])
    except (decord.DECORDError, RuntimeError):
        return _probe_with_av(path)


def write_mp4(path: str | Path, frames: np.ndarray, fps: float, *, gop: int = 8, crf: int = 18) -> None:
    """Write (T, H, W, 3) uint8 RGB as H.264, completely or not at all. A short GOP makes random access cheap."""
    path = Path(path)
    height, width = frames.shape[1:3]
    with atomic_path(path) as part, av.open(str(part), "w") as container:
        stream = container.add_stream(
            "libx264",
            rate=Fraction(fps).limit_denominator(1000),
            options={"crf": str(crf), "g": str(gop), "preset": "veryfast"},
        )
        stream.width, stream.height = width - width % 2, height - height % 2
        stream.pix_fmt = "yuv420p"
        for image in frames:
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(image[: stream.height, : stream.width]), format="rgb24"
            )
            # libswscale leaves the padding of rows unset and x264 reads it, so that equal pictures gave unequal files
            # where the width is no multiple of 16; a frame made from an array has no such padding.
            planes = frame.reformat(format="yuv420p").to_ndarray()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())


def resize(frames: np.ndarray, size: int, mode: str = "squeeze") -> Tensor:
    """(T, H, W, 3) uint8 -> (T, 3, size, size) float in [0, 1], antialiased.

    mode: "squeeze" ignores the aspect ratio (as VPP does), "crop" takes the central square.
    """
    if mode not in ("squeeze", "crop"):
        raise UserError(f"unknown aspect rule {mode!r}; use squeeze or crop")
    if mode == "crop":
        height, width = frames.shape[1:3]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        frames = frames[:, top : top + side, left : left + side]
    images = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False).clamp_(0, 1)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"{path}: no such video")
    if not path.stat().st_size:
        raise VideoError(f"{path}: empty file")
    return path


def _wanted(path: Path, indices: Sequence[int] | None, count: int) -> list[int]:
    if not count:
        raise VideoError(f"{path}: no frames")
    wanted = list(range(count)) if indices is None else [int(i) for i in indices]
    if wanted and not (min(wanted) >= 0 and max(wanted) < count):
        raise VideoError(f"{path}: frames {min(wanted)}..{max(wanted)} asked of a video of {count}")
    return wanted


def _decode_with_av(path: Path, indices: Sequence[int] | None) -> np.ndarray:
    """Decode all frames and keep those at `indices`."""
    keep, found, count = None if indices is None else set(map(int, indices)), {}, 0
    try:
        with av.open(str(path)) as container:
            for count, frame in enumerate(container.decode(video=0), start=1):
                if keep is None or count - 1 in keep:
                    found[count - 1] = frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, IndexError) as error:
        raise VideoError(f"{path}: cannot be decoded ({error})") from error
    return np.stack([found[index] for index in _wanted(path, indices, count)])


def _probe_with_av(path: Path) -> tuple[int, float, tuple[int, int]]:
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            count = sum(1 for _ in container.decode(video=0))
            rate, size = float(stream.average_rate or 0), (stream.height, stream.width)
    except (av.FFmpegError, IndexError) as error:
        raise VideoError(f"{path}: cannot be decoded ({error})") from error
    _wanted(path, None, count)
    return count, rate, size
