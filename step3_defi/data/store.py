"""The annotated frames of a CALVIN dataset, packed once, so that random windows are fast to read (Sec. 4.2).

Reading a frame from a pack costs a read of a memory map. Without a pack, an npz file is opened and decompressed.

    <folder>/.defi_cache/pack1-<key>/00000.safetensors
        SHARD consecutive frames: rel_actions (n, 7), and the pictures rgb_static (m, 200, 200, 3), ... of some of them
    <folder>/.defi_cache/pack1-<key>/index.safetensors
        frames (N,), rel_actions (N, 7), pictured (M,), the frames with pictures; written last, so that a folder without
        it is an unfinished pack

Pictures keep their size and every bit, which takes 141 kB a frame with both cameras. The 674,946 annotated frames of
task_ABC_D take 95 GB at most (517 GB as published); frames outside of annotations are not packed. A shard gets its name
when it is complete, so a build that was killed continues with the missing shards.
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

from common.calvin_format import CalvinFormatError, read_frame
from common.errors import UserError
from common.files import atomic_path
from common.progress import tqdm
from common.workers import pool

PACK_PREFIX = "pack1-"  # the number is that of the format
SHARD = 512  # frames in a file
INDEX, ACTIONS = "index.safetensors", "rel_actions"


class PackError(UserError):
    """A pack that cannot be written or read."""


class Pack:
    """A finished pack. A shard is opened when one of its frames is read, in every process anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            with safe_open(folder / INDEX, framework="np") as index:
                # One string of JSON, because safetensors writes several entries in any order.
                self.record = json.loads(index.metadata()["pack"])
                self.frames, self.actions, self.image_frames = (
                    index.get_tensor(name) for name in ("frames", ACTIONS, "pictured")
                )
        except SafetensorError as error:
            raise _unreadable(folder / INDEX, error) from error
        self._starts = np.searchsorted(self.image_frames, self.frames[:: self.record["shard"]])
        self._shards: dict[int, Any] = {}

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Pack, (self.folder,)

    def holds(self, frames: np.ndarray, image_frames: np.ndarray, keys: Sequence[str]) -> bool:
        """Whether the pack holds the actions of `frames` and the pictures `keys` of `image_frames`."""
        return (
            set(keys) <= set(self.record["keys"])
            and np.isin(frames, self.frames).all()
            and np.isin(image_frames, self.image_frames).all()
        )

    def read_actions(self, frames: np.ndarray) -> np.ndarray:
        """The (N, 7) float32 relative actions of N frames."""
        return self.actions[np.searchsorted(self.frames, frames)]

    def read_images(self, frame: int, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Key -> picture (H, W, 3) uint8, as calvin_format.read_frame gives it."""
        number = int(np.searchsorted(self.frames, frame)) // self.record["shard"]
        row = int(np.searchsorted(self.image_frames, frame) - self._starts[number])
        try:
            if number not in self._shards:
                self._shards[number] = safe_open(_shard(self.folder, number), framework="np")
            return {key: self._shards[number].get_slice(key)[row : row + 1][0] for key in keys}
        except (OSError, SafetensorError) as error:
            raise _unreadable(_shard(self.folder, number), error) from error


def _unreadable(path: Path, error: Exception) -> PackError:
    return PackError(f"{path}: not readable ({error}); remove its folder, and it will be packed again")


def find_pack(
    folder: Path, frames: np.ndarray, image_frames: np.ndarray, keys: Sequence[str], cache: Path
) -> Pack | None:
    """A finished pack of the dataset as it is now that holds what is asked for (see Pack.holds), or None."""
    for index in sorted(cache.glob(f"{PACK_PREFIX}*/{INDEX}")):
        pack = Pack(index.parent)
        if pack.record["stamp"] == _stamp(folder) and pack.holds(frames, image_frames, keys):
            return pack
    return None


def get_or_build_pack(
    folder: Path,
    frames: np.ndarray,
    image_frames: np.ndarray,
    keys: Sequence[str],
    cache: Path,
    *,
    workers: int = 1,
    shard: int = SHARD,
) -> Pack:
    """Find a pack, finish an unfinished one, or build one, with the actions of `frames` and the pictures `keys`.

    Pictures are packed of `image_frames`. One process builds at a time; others wait for it and open the result. Raises
    PackError if the disk is full or cannot be written, and CalvinFormatError that names the first damaged file; what
    was packed before stays.
    """
    frames = np.union1d(frames, image_frames).astype(np.int64)
    record = json.dumps({"keys": sorted(keys), "shard": shard, "stamp": _stamp(folder)})
    digest = hashlib.sha256(record.encode() + frames.tobytes() + b"|" + image_frames.tobytes()).hexdigest()
    target = cache / f"{PACK_PREFIX}{digest[:16]}"
    if pack := find_pack(folder, frames, image_frames, keys, cache):
        return pack
    try:
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):
            if not (target / INDEX).is_file():
                _fill(target, folder, frames, image_frames, record, workers)
    except OSError as error:
        free = shutil.disk_usage(next(place for place in (target, *target.parents) if place.is_dir())).free
        raise PackError(
            f"{target} cannot be written ({error}; {free / 1e9:.1f} GB are free there): free some space, or name "
            "another folder with data.cache_dir; the same command then continues"
        ) from error
    return Pack(target)


def _fill(target: Path, folder: Path, frames: np.ndarray, image_frames: np.ndarray, record: str, workers: int) -> None:
    """Write the missing shards, then the index.

    The caller holds the lock, so hidden files are left over from a build that was killed.
    """
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
            save(
                {"frames": frames, ACTIONS: actions, "pictured": image_frames.astype(np.int64)},
                metadata={"pack": record},
            )
        )


def _run_jobs(jobs: list[tuple], workers: int) -> Iterator[int]:
    """Write the shards `jobs`; yields the number of frames of each one that is done."""
    if workers <= 1 or len(jobs) <= 1:
        yield from map(_write, jobs)
        return
    with pool(min(workers, len(jobs))) as processes:
        try:
            yield from processes.map(_write, jobs)
        except BrokenProcessPool as error:
            raise PackError(
                "a packing process was killed, perhaps because memory ran out; the same command continues, and "
                "workers=1 takes the least memory"
            ) from error
        finally:
            processes.shutdown(cancel_futures=True)


def _write(job: tuple[Path, Path, np.ndarray, np.ndarray, list[str]]) -> int:
    """Write one shard and return its number of frames. Every npz file is opened once."""
    path, folder, frames, image_frames, keys = job
    with_pictures, actions, pictures = set(image_frames.tolist()), [], {key: [] for key in keys}
    for frame in frames.tolist():
        arrays = read_frame(folder, frame, [ACTIONS, *(keys if frame in with_pictures else ())])
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
        part.write_bytes(save(arrays))  # save_file would make the file unreadable for other users
    return len(frames)


def _check_disk_space(target: Path, folder: Path, count: int, image_frames: np.ndarray, keys: list[str]) -> None:
    """Raise PackError before hours of packing if the pictures of `count` frames exceed the free disk space."""
    if not count or not keys:
        return
    needed = count * sum(picture.nbytes for picture in read_frame(folder, int(image_frames[0]), keys).values())
    free = shutil.disk_usage(target).free
    if needed > free:
        raise PackError(
            f"{target}: {needed / 1e9:.1f} GB are needed for {count} frames and {free / 1e9:.1f} GB are free; free "
            "some space, name another folder with data.cache_dir, or read the npz files with data.pack=false"
        )


def _is_complete(path: Path) -> bool:
    try:
        _actions(path)
    except (FileNotFoundError, SafetensorError):  # a power failure can truncate a file after its renaming
        return False
    return True


def _actions(path: Path) -> np.ndarray:
    """The (n, 7) actions of a shard."""
    with safe_open(path, framework="np") as shard:
        return shard.get_tensor(ACTIONS)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _stamp(folder: Path) -> str:
    """A string that changes when the dataset at this path is recorded again."""
    status = (folder / "ep_start_end_ids.npy").stat()
    return f"{status.st_mtime_ns}-{status.st_size}"
