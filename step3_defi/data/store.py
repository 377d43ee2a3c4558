"""CALVIN's annotated frames packed once, so that a random window costs a read of a memory map and not an npz to open
and inflate (Sec. 4.2).

    <folder>/.defi_cache/pack1-<key>/00000.safetensors   of SHARD frames in a row: rel_actions (n, 7), and rgb_static
    (m, 200, 200, 3), ... of the pictured ones
    <folder>/.defi_cache/pack1-<key>/index.safetensors   written last: frames (N,), rel_actions (N, 7), pictured (M,);
    without it a pack is unfinished

Pictures keep their size and every bit: 141 kB a frame with both cameras. The 674,946 annotated frames of task_ABC_D
take 95 GB at most
(517 GB as published); frames outside of annotations are not packed. A shard is renamed to its place when it is whole,
so a killed build
goes on with the shards that are missing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from common.calvin_format import CalvinFormatError, read_frame
from common.files import atomic_path
from common.workers import pool

NAME, SHARD = "pack1-", 512  # the number is the format's
INDEX, ACTIONS = "index.safetensors", "rel_actions"


class PackError(ValueError):
    """A pack that cannot be written or read."""


class Pack:
    """A finished pack. Shards are mapped as their frames are asked for; a copy in another process maps them anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            with safe_open(folder / INDEX, framework="np") as index:
                self.record = json.loads(
                    index.metadata()["pack"]
                )  # one string: safetensors writes several in any order
                self.frames, self.actions, self.image_frames = (
                    index.get_tensor(name) for name in ("frames", ACTIONS, "pictured")
                )
        except SafetensorError as error:
            raise PackError(
                f"{folder / INDEX}: not readable ({error}); remove the folder, it is packed anew"
            ) from error
        self._starts = np.searchsorted(self.image_frames, self.frames[:: self.record["shard"]])
        self._shards: dict[int, Any] = {}

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Pack, (self.folder,)

    def holds(self, frames: np.ndarray, image_frames: np.ndarray, keys: Sequence[str]) -> bool:
        """Are the motions of `frames` and the pictures of `pictured` inside?"""
        return (
            set(keys) <= set(self.record["keys"])
            and np.isin(frames, self.frames).all()
            and np.isin(image_frames, self.image_frames).all()
        )

    def read_actions(self, frames: np.ndarray) -> np.ndarray:
        """(N, 7) float32 relative actions."""
        return self.actions[np.searchsorted(self.frames, frames)]

    def read_images(self, frame: int, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Key -> (H, W, 3) uint8, as read_frame gives it."""
        number = int(np.searchsorted(self.frames, frame)) // self.record["shard"]
        row = int(np.searchsorted(self.image_frames, frame) - self._starts[number])
        try:
            if number not in self._shards:
                self._shards[number] = safe_open(_shard(self.folder, number), framework="np")
            return {key: self._shards[number].get_slice(key)[row : row + 1][0] for key in keys}
        except (OSError, SafetensorError) as error:
            raise PackError(
                f"{_shard(self.folder, number)}: not readable ({error}); remove the folder, it is packed anew"
            ) from error


def find(folder: Path, frames: np.ndarray, image_frames: np.ndarray, keys: Sequence[str], cache: Path) -> Pack | None:
    """A finished pack of this state of the dataset that holds all that is asked for."""
    for index in sorted(cache.glob(f"{NAME}*/{INDEX}")):
        pack = Pack(index.parent)
        if pack.record["stamp"] == _stamp(folder) and pack.holds(frames, image_frames, keys):
            return pack
    return None


def packed(
    folder: Path,
    frames: np.ndarray,
    image_frames: np.ndarray,
    keys: Sequence[str],
    cache: Path,
    *,
    workers: int = 1,
    shard: int = SHARD,
) -> Pack:
    """Find a pack, go on with an unfinished one, or build it: motions of `frames` and, where `pictured`, the pictures
    named by `keys`.

    One process builds at a time; others wait and open what it made. Raises PackError where the disk is full or cannot
    be written, and
    CalvinFormatError naming the first file that is not as it should be; what was packed before stays.
    """
    frames = np.union1d(frames, image_frames).astype(np.int64)
    record = json.dumps({"keys": sorted(keys), "shard": shard, "stamp": _stamp(folder)})
    target = cache / (
        NAME + hashlib.sha256(record.encode() + frames.tobytes() + b"|" + image_frames.tobytes()).hexdigest()[:16]
    )
    if pack := find(folder, frames, image_frames, keys, cache):
        return pack
    try:
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):
            if not (target / INDEX).is_file():
                _fill(target, folder, frames, image_frames, record, workers)
    except OSError as error:
        free = shutil.disk_usage(next(place for place in (target, *target.parents) if place.is_dir())).free
        raise PackError(
            f"{target} cannot be written ({error}; {free / 1e9:.1f} GB are free there): make room or name another "
            "place with "
            f"data.cache_dir, then the same command goes on"
        ) from error
    return Pack(target)


def _fill(target: Path, folder: Path, frames: np.ndarray, image_frames: np.ndarray, record: str, workers: int) -> None:
    """Write the shards that are missing, then the index. The caller holds the lock, so hidden files are those of a
    killed attempt."""
    for stale in target.glob(".*.part*"):
        stale.unlink()
    known = json.loads(record)
    size, keys = known["shard"], known["keys"]
    parts = [frames[start : start + size] for start in range(0, len(frames), size)]
    jobs = [
        (_shard(target, number), folder, part, np.intersect1d(part, image_frames), keys)
        for number, part in enumerate(parts)
        if not _is_complete(_shard(target, number))
    ]
    _check_disk_space(target, folder, sum(len(job[3]) for job in jobs), image_frames, keys)
    with tqdm(
        total=len(frames),
        initial=len(frames) - sum(len(job[2]) for job in jobs),
        desc=f"pack {folder.parent.name}/{folder.name}",
        unit="frame",
        mininterval=1,
    ) as bar:
        for count in _run_jobs(jobs, workers):
            bar.update(count)
    actions = np.concatenate([_actions(_shard(target, number)) for number in range(len(parts))])
    with atomic_path(target / INDEX) as part:
        part.write_bytes(
            save({"frames": frames, ACTIONS: actions, "pictured": image_frames.astype(np.int64)}, metadata={"pack": record})
        )


def _run_jobs(jobs: list[tuple], workers: int) -> Iterator[int]:
    """Carry the jobs out; yields the number of frames of each that is done."""
    if workers <= 1 or len(jobs) <= 1:
        yield from map(_write, jobs)
        return
    with pool(min(workers, len(jobs))) as processes:
        try:
            yield from processes.map(_write, jobs)
        except BrokenProcessPool as error:
            raise PackError(
                "a packing process was killed, perhaps for memory; the same command goes on, with workers=1 it needs "
                "the least"
            ) from error
        finally:
            processes.shutdown(cancel_futures=True)


def _write(job: tuple[Path, Path, np.ndarray, np.ndarray, list[str]]) -> int:
    """One shard. Every npz is opened once."""
    path, folder, frames, image_frames, keys = job
    shown, actions, pictures = set(image_frames.tolist()), [], {key: [] for key in keys}
    for frame in frames.tolist():
        arrays = read_frame(folder, frame, [ACTIONS, *(keys if frame in shown else ())])
        actions.append(arrays.pop(ACTIONS).astype(np.float32))
        for key, picture in arrays.items():
            if pictures[key] and picture.shape != pictures[key][0].shape:
                raise CalvinFormatError(
                    f"{folder}, frame {frame}: {key} has shape {picture.shape}, the frames before it "
                    f"{pictures[key][0].shape}"
                )
            pictures[key].append(picture)
    arrays = {ACTIONS: np.stack(actions)} | {key: np.stack(found) for key, found in pictures.items() if found}
    with atomic_path(path) as part:
        part.write_bytes(save(arrays))  # save_file would let nobody else read it
    return len(frames)


def _check_disk_space(target: Path, folder: Path, count: int, image_frames: np.ndarray, keys: list[str]) -> None:
    """A disk that is too small should say so before hours of packing."""
    if not count or not keys:
        return
    needed = count * sum(picture.nbytes for picture in read_frame(folder, int(image_frames[0]), keys).values())
    free = shutil.disk_usage(target).free
    if needed > free:
        raise PackError(
            f"{target}: {needed / 1e9:.1f} GB are needed for {count} frames and {free / 1e9:.1f} GB are free; make "
            "room, name another "
            f"place with data.cache_dir, or read the npz files with data.pack=false"
        )


def _is_complete(path: Path) -> bool:
    try:
        _actions(path)
    except (FileNotFoundError, SafetensorError):  # the latter: cut off by a power failure, after it was renamed
        return False
    return True


def _actions(path: Path) -> np.ndarray:
    """(n, 7) motions of a shard."""
    with safe_open(path, framework="np") as shard:
        return shard.get_tensor(ACTIONS)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _stamp(folder: Path) -> str:
    """Changes when the dataset is recorded anew under the same path."""
    status = (folder / "ep_start_end_ids.npy").stat()
    return f"{status.st_mtime_ns}-{status.st_size}"
