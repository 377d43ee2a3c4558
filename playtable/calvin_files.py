"""Writing CALVIN's dataset format and, beside it, a video set (facts: CALVIN's README; VPP's annotation json).

    <out>/{training,validation}/episode_0000000.npz ...     one file a frame
    <out>/{training,validation}/{ep_start_end_ids,ep_lens,scene_info}.npy, statistics.yaml, lang_annotations/auto_lang_ann.npy
    <out>/videos_set/{annotation,videos}/{train,val}/...    camera 0 static, camera 1 wrist
"""
from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml

from playtable.demonstrate import Segment

FPS = 30
PIXELS = ("rgb_static", "rgb_gripper")
VECTORS = ("actions", "rel_actions", "robot_obs", "scene_obs")


def write_frames(folder: Path, segment: Segment) -> None:
    """One npz a frame, 00000.npz onwards. The fastest level of deflate: these pictures shrink to a tenth with it already."""
    columns = {**{key: getattr(segment, key) for key in PIXELS}, "actions": segment.absolute_actions(),
               "rel_actions": segment.rel_actions, "robot_obs": segment.robot_obs, "scene_obs": segment.scene_obs}
    folder.mkdir(parents=True)
    for frame in range(len(segment)):
        with zipfile.ZipFile(folder / f"{frame:05d}.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for key, values in columns.items():
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, np.asarray(values[frame]), allow_pickle=False)
                archive.writestr(f"{key}.npy", buffer.getvalue())


def write_films(folder: Path, segment: Segment) -> None:
    """0.mp4 and 1.mp4, H.264 with a short GOP."""
    for camera, key in enumerate(PIXELS):
        images = getattr(segment, key)
        with av.open(str(folder / f"{camera}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"crf": "16", "g": "8", "preset": "veryfast"})
            stream.height, stream.width = images[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            for image in images:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())


def write_split(folder: Path, episodes: list[dict[str, Any]], scenes: dict[str, list[int]]) -> None:
    """The index files of training/ or validation/. `episodes`: {"start", "end", "sentence", "task"}, inclusive frame ids."""
    spans = np.array([(e["start"], e["end"]) for e in episodes], dtype=np.int64).reshape(-1, 2)
    save_npy(folder / "ep_start_end_ids.npy", spans)
    save_npy(folder / "ep_lens.npy", spans[:, 1] - spans[:, 0] + 1)
    save_npy(folder / "scene_info.npy", scenes)
    annotations = {"language": {"ann": [e["sentence"] for e in episodes], "task": [e["task"] for e in episodes],
                                "emb": np.zeros((len(episodes), 1, 1), np.float32)},  # CALVIN's slot for a language model's embedding
                   "info": {"episodes": [], "indx": [(int(a), int(b)) for a, b in spans]}}
    (folder / "lang_annotations").mkdir(exist_ok=True)
    save_npy(folder / "lang_annotations" / "auto_lang_ann.npy", annotations)


def write_statistics(folder: Path, vectors: dict[str, np.ndarray]) -> None:
    """Mean and deviation of the readings and the bounds of the actions."""
    record: dict[str, Any] = {}
    for key in ("robot_obs", "scene_obs"):
        values = vectors[key]
        record[key] = [{"_target_": "calvin_agent.utils.transforms.NormalizeVector", "mean": values.mean(0).tolist(), "std": values.std(0).tolist()}]
    record["act_min_bound"], record["act_max_bound"] = (getattr(vectors["actions"], bound)(0).tolist() for bound in ("min", "max"))
    write_text(folder / "statistics.yaml", yaml.safe_dump(record, sort_keys=False))


def write_annotation(root: Path, split: str, name: str, sentence: str, length: int) -> None:
    """The json of one video, as VPP and the official release lay it out."""
    record = {"task": "robot_trajectory_prediction", "texts": [sentence], "episode_id": name, "video_length": length,
              "videos": [{"video_path": f"videos/{split}/{name}/{camera}.mp4"} for camera in (0, 1)],
              "latent_videos": [{"latent_video_path": f"latent_videos/{split}/{name}/{camera}.pt"} for camera in (0, 1)]}
    write_text(root / "annotation" / split / f"{name}.json", json.dumps(record, indent=2) + "\n")


def save_npy(path: Path, value: Any) -> None:
    """np.save, beside and then renamed."""
    beside = path.with_suffix(".part")
    with beside.open("wb") as stream:
        np.save(stream, value, allow_pickle=True)
    os.replace(beside, path)


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(text)
    os.replace(beside, path)
