"""Writing CALVIN's dataset format and, beside it, a video set (facts: CALVIN's README; VPP's annotation json).

<out>/{training,validation}/episode_0000000.npz ...     one file a frame
<out>/{training,validation}/{ep_start_end_ids,ep_lens,scene_info}.npy, statistics.yaml,
lang_annotations/auto_lang_ann.npy
<out>/videos_set/{annotation,videos}/{train,val}/...    camera 0 static, camera 1 wrist (not where a hand is filmed)
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml

from envs.recording.demonstrate import Segment

FPS = 30
RGB_KEYS = ("rgb_static", "rgb_gripper")


def write_frames(folder: Path, segment: Segment) -> None:
    """One npz a frame, 00000.npz onwards, and the vectors of all of them in vectors.npz."""
    vectors = {
        "actions": segment.absolute_actions(),
        "rel_actions": np.array(segment.rel_actions),
        "robot_obs": np.array(segment.robot_obs),
        "scene_obs": np.array(segment.scene_obs),
    }
    columns = {**{key: getattr(segment, key) for key in RGB_KEYS}, **vectors}
    folder.mkdir(parents=True)
    np.savez(folder / "vectors.npz", **vectors)
    for frame in range(len(segment)):
        with zipfile.ZipFile(folder / f"{frame:05d}.npz", "w") as archive:
            for key, values in columns.items():
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, np.asarray(values[frame]), allow_pickle=False)
                # A fixed date keeps recordings of one seed equal; the fastest level of deflate does most already.
                member = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                archive.writestr(member, buffer.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=1)


def write_videos(folder: Path, segment: Segment, cameras: int = 2) -> None:
    """0.mp4 and 1.mp4, or the first of them alone; H.264 with a short GOP."""
    folder.mkdir(parents=True, exist_ok=True)
    for camera, key in enumerate(RGB_KEYS[:cameras]):
        images = getattr(segment, key)
        with av.open(str(folder / f"{camera}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"crf": "16", "g": "8", "preset": "veryfast"})
            stream.height, stream.width = images[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            for image in images:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())


def write_split(folder: Path, episodes: list[dict[str, Any]], scenes: dict[str, list[int]]) -> None:
    """The index files of training/ or validation/, ids inclusive; ep_start_end_ids.npy comes last and marks it whole.

    `episodes` holds {"start", "end", "sentence", "task"}, `scenes` the first and last frame of each scene.
    """
    spans = np.array([(e["start"], e["end"]) for e in episodes], dtype=np.int64).reshape(-1, 2)
    save_npy(folder / "ep_lens.npy", spans[:, 1] - spans[:, 0] + 1)
    save_npy(folder / "scene_info.npy", scenes)
    annotations = {
        "language": {
            "ann": [e["sentence"] for e in episodes],
            "task": [e["task"] for e in episodes],
            # CALVIN's slot for a language model's embedding of the sentence
            "emb": np.zeros((len(episodes), 1, 1), np.float32),
        },
        "info": {"episodes": [], "indx": [(int(a), int(b)) for a, b in spans]},
    }
    (folder / "lang_annotations").mkdir(exist_ok=True)
    save_npy(folder / "lang_annotations" / "auto_lang_ann.npy", annotations)
    save_npy(folder / "ep_start_end_ids.npy", spans)


def write_statistics(folder: Path, vectors: dict[str, np.ndarray]) -> None:
    """Mean and deviation of the readings and the bounds of the actions."""
    record: dict[str, Any] = {}
    for key in ("robot_obs", "scene_obs"):
        values = vectors[key]
        moments = {"mean": values.mean(0).tolist(), "std": values.std(0).tolist()}
        record[key] = [{"_target_": "calvin_agent.utils.transforms.NormalizeVector", **moments}]
    record["act_min_bound"] = vectors["actions"].min(0).tolist()
    record["act_max_bound"] = vectors["actions"].max(0).tolist()
    write_text(folder / "statistics.yaml", yaml.safe_dump(record, sort_keys=False))


def write_env_config(folder: Path, scenes: list[str], world: str, versions: dict[str, str]) -> None:
    """`.hydra/merged_config.yaml`: which world these frames come from, in the keys of CALVIN's own file."""
    config = {
        "world": world,
        "versions": versions,
        "scene": {"name": [f"calvin_scene_{scene}" for scene in scenes]},
        "cameras": {
            "static": {"name": "static", "width": 200, "height": 200, "fov": 10},
            "gripper": {"name": "gripper", "width": 84, "height": 84, "fov": 75},
        },
        "env": {"control_freq": FPS},
        "robot": {"max_rel_pos": 0.02, "max_rel_orn": 0.05, "euler_obs": True},
    }
    write_text(folder / ".hydra" / "merged_config.yaml", yaml.safe_dump(config, sort_keys=False))


def save_npy(path: Path, value: Any) -> None:
    """np.save, beside and then renamed."""
    atomic_path = path.with_suffix(".part")
    with atomic_path.open("wb") as stream:
        np.save(stream, value, allow_pickle=True)
    os.replace(atomic_path, path)


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_path = path.with_suffix(".part")
    atomic_path.write_text(text)
    os.replace(atomic_path, path)
