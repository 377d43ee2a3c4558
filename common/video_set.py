"""Video sets on disk: the one owner of their format, for every step and for what records them (Secs. 3.1-3.2, A.2).

    <set>/annotation/{train,val}/<id>.json         one episode, see `write_annotation`
    <set>/videos/{train,val}/<id>/<camera>.mp4
    <set>/latent_videos/{train,val}/<id>/<camera>.pt    fp32 (T, c, h, w), already times the VAE's scaling factor

This is the layout of VPP and of the official release; published sets may call the last folder latent_videos_svd. An
annotation is a JSON object. Required: texts [str, ...] and videos [{video_path}, ...], one entry per camera, paths
relative to the set. Optional: latent_videos [{latent_video_path}, ...], video_length (frames), fps, scene, task,
episode_id, and state, the robot's readings [T][D]. Other keys are kept and ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UnreadableSample, UserError
from common.files import write_json, write_text

HOLDOUT = 20  # a set without a val split holds out its episodes 0, 20, 40, ... (UniVLA holds out 5 % as well)
LATENT_FOLDERS = ("latent_videos", "latent_videos_svd")


def split_indices(count: int, split: str) -> np.ndarray:
    """Which of `count` episodes belong to "train" or "val" where a data set has no val split of its own.

    Every model holds out the same episodes, so that none is validated on what another was trained on. A single episode
    is not held out. Raises UserError for any other split.
    """
    if split not in ("train", "val"):
        raise UserError(f"split is {split!r}; use train or val")
    held_out = np.arange(count) % HOLDOUT == 0
    if count == 1:
        held_out[:] = False
    return np.flatnonzero(held_out == (split == "val"))


def annotations(folder: Path, split: str, *, only_split: str | None = None) -> list[Path]:
    """The annotation files of a split in order; `folder` holds the splits, usually <set>/annotation.

    Where there is no val folder, `split_indices` divides the train folder. `only_split` names the folder to divide
    instead, for sets that were published with one split only.
    """
    if only_split is None and ((folder / "val").is_dir() or split not in ("train", "val")):
        return sorted((folder / split).glob("*.json"))
    files = sorted((folder / (only_split or "train")).glob("*.json"))
    return [files[index] for index in split_indices(len(files), split)]


def read_annotation(file: Path) -> dict[str, Any]:
    """One annotation with at least one sentence. Raises UnreadableSample."""
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UnreadableSample(str(file), f"is not readable JSON ({error})") from error
    texts = record.get("texts") if isinstance(record, dict) else None
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str):
        raise UnreadableSample(str(file), "has no sentence: 'texts' must be a list that starts with a string")
    return record


def num_cameras(file: Path, record: Mapping[str, Any]) -> int:
    """How many cameras filmed the episode. Raises UnreadableSample where there is none."""
    entries = record.get("videos")
    if not isinstance(entries, list) or not entries:
        raise UnreadableSample(str(file), "names no videos: 'videos' must be a list with one entry per camera")
    return len(entries)


def known_length(record: Mapping[str, Any]) -> int | None:
    """Number of frames that an annotation states: one reading in `state` per frame, else `video_length`, else None."""
    if isinstance(record.get("state"), list):
        return len(record["state"])
    length = record.get("video_length")
    return length if isinstance(length, int) and length > 0 else None


def video_path(root: Path, file: Path, record: Mapping[str, Any], camera: int) -> Path:
    """The video of a camera, as its annotation names it. Raises UnreadableSample where it names none."""
    path = _path_inside(root, file, record, "videos", "video_path", camera)
    if path is None:
        raise UnreadableSample(
            str(file),
            f"names no video for camera {camera}, it has {num_cameras(file, record)} cameras; "
            "set the camera of this set in the data config",
        )
    return path


def latent_target(root: Path, file: Path, record: Mapping[str, Any], camera: int) -> Path:
    """Where a camera's latents belong: as its annotation says, else latent_videos/<split>/<id>/<camera>.pt."""
    named = _path_inside(root, file, record, "latent_videos", "latent_video_path", camera)
    return named or root / LATENT_FOLDERS[0] / file.parent.name / file.stem / f"{camera}.pt"


def latent_path(root: Path, file: Path, record: Mapping[str, Any], camera: int) -> Path:
    """The latents of a camera. Raises UnreadableSample where there are none.

    Published sets name one of LATENT_FOLDERS in their annotations and use the other on disk, so both are tried.
    """
    path = latent_target(root, file, record, camera)
    first, *rest = path.relative_to(root).parts
    folders = [first, *LATENT_FOLDERS] if first in LATENT_FOLDERS else [first]
    for folder in dict.fromkeys(folders):
        if (candidate := root.joinpath(folder, *rest)).is_file():
            return candidate
    raise UnreadableSample(
        str(file),
        f"its latents {path.relative_to(root)} are missing; make them with "
        f"scripts/step1_prepare_data_latent.sh videos={root}",
    )


def has_latents(root: Path) -> bool:
    """Whether a set has a folder of latents."""
    return any((root / name).is_dir() for name in LATENT_FOLDERS)


def write_annotation(
    root: Path,
    split: str,
    name: str,
    *,
    texts: Sequence[str],
    num_cameras: int,
    length: int,
    fps: float | None = None,
    scene: str | None = None,
    states: np.ndarray | None = None,
    task: str | None = None,
    episode_id: str | None = None,
) -> Path:
    """Write <root>/annotation/<split>/<name>.json and return its path. Write it last: it marks the episode as complete.

    The videos of `num_cameras` cameras lie at videos/<split>/<name>/<camera>.mp4 and have `length` frames each. states:
    (T, D) readings of the robot, rounded to five decimals. episode_id: the name at its source, `name` unless given.
    What is None is left out.
    """
    place = f"{split}/{name}"
    optional = {
        "fps": fps,
        "scene": scene,
        "task": task,
        "state": None if states is None else np.asarray(states, np.float64).round(5).tolist(),
    }
    record = {
        "texts": list(texts),
        "videos": [{"video_path": f"videos/{place}/{camera}.mp4"} for camera in range(num_cameras)],
        "latent_videos": [
            {"latent_video_path": f"{LATENT_FOLDERS[0]}/{place}/{camera}.pt"} for camera in range(num_cameras)
        ],
        "episode_id": episode_id or name,
        "video_length": length,
        **{key: value for key, value in optional.items() if value is not None},
    }
    file = root / "annotation" / split / f"{name}.json"
    write_text(file, json.dumps(record) + "\n")
    return file


def write_latent_paths(root: Path, file: Path, record: Mapping[str, Any], length: int) -> None:
    """Name the latents and their `length` in an annotation of the set `root`, unless it names them already."""
    new = dict(record)
    if known_length(new) is None:
        new["video_length"] = length
    new["latent_videos"] = [
        {"latent_video_path": latent_target(root, file, record, camera).relative_to(root).as_posix()}
        for camera in range(num_cameras(file, record))
    ]
    if not file.is_file() or new != record:
        write_json(file, new)


def finished_length(root: Path, split: str, name: str) -> int:
    """Number of frames of an episode that is complete, with its annotation and all its videos; 0 for any other."""
    file = root / "annotation" / split / f"{name}.json"
    try:
        record = read_annotation(file)
        complete = all(video_path(root, file, record, n).is_file() for n in range(num_cameras(file, record)))
    except UnreadableSample:
        return 0
    return (known_length(record) or 0) if complete else 0


def _path_inside(root: Path, file: Path, record: Mapping[str, Any], field: str, key: str, camera: int) -> Path | None:
    """A path that an annotation gives, None where it gives none. Raises UnreadableSample where it leaves the set."""
    entries = record.get(field)
    if not isinstance(entries, list) or camera >= len(entries):
        return None
    name = entries[camera].get(key) if isinstance(entries[camera], dict) else None
    if not isinstance(name, str):
        raise UnreadableSample(str(file), f"{field}[{camera}] has no {key}")
    # the name is judged, not where it leads: a set may be reached through symbolic links
    if Path(name).is_absolute() or Path(os.path.normpath(name)).parts[:1] in ((), ("..",)):
        raise UnreadableSample(str(file), f"{field}[{camera}] points outside its set: {name}")
    return root / name
