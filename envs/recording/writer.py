"""Write CALVIN's dataset format, and the videos of a video set (`common.video_set` writes its annotations).

<out>/{training,validation}/episode_0000000.npz ...                             one file per frame
<out>/{training,validation}/{ep_start_end_ids,ep_lens,scene_info}.npy           recordings and scenes
<out>/{training,validation}/lang_annotations/auto_lang_ann.npy                  sentences
<out>/{training,validation}/{statistics.yaml,.hydra/merged_config.yaml}
<out>/videos_set/{annotation,videos}/{train,val}/...    camera 0 is static, camera 1 is at the wrist (robot only)
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.files import atomic_path, write_text
from envs.protocol import CONTROL_FREQ, MAX_REL_ORN, MAX_REL_POS
from envs.recording.demonstrate import Segment

RGB_KEYS = ("rgb_static", "rgb_gripper")
VIDEO_CRF = 16  # H.264 quality; lower is better


def write_frames(folder: Path, segment: Segment) -> None:
    """Write one npz per frame, 00000.npz onwards, and the vectors of all frames in vectors.npz."""
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
                # A fixed date makes recordings with the same seed equal byte by byte. Higher levels of compression
                # cost much more time and save little space.
                member = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                archive.writestr(member, buffer.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=1)


def write_videos(folder: Path, segment: Segment, cameras: int = 2) -> None:
    """Write 0.mp4 (static camera) and, for two cameras, 1.mp4 (wrist camera)."""
    # Imported here, because it loads torch, which costs each worker seconds and memory: only videos need it.
    from common.video import write_mp4

    for camera, key in enumerate(RGB_KEYS[:cameras]):
        write_mp4(folder / f"{camera}.mp4", np.array(getattr(segment, key)), CONTROL_FREQ, crf=VIDEO_CRF)


def write_split(folder: Path, episodes: list[dict[str, Any]], scenes: dict[str, list[int]]) -> None:
    """Write the index files of training/ or validation/. ep_start_end_ids.npy comes last and marks it as complete.

    `episodes` holds dictionaries with start, end (ids of the first and last frame), instruction and task; `scenes` maps
    a scene to the ids of its first and last frame.
    """
    spans = np.array([(e["start"], e["end"]) for e in episodes], dtype=np.int64).reshape(-1, 2)
    save_npy(folder / "ep_lens.npy", spans[:, 1] - spans[:, 0] + 1)
    save_npy(folder / "scene_info.npy", scenes)
    annotations = {
        "language": {
            "ann": [e["instruction"] for e in episodes],
            "task": [e["task"] for e in episodes],
            # CALVIN keeps a language model's embedding of the sentence here; it is not computed.
            "emb": np.zeros((len(episodes), 1, 1), np.float32),
        },
        "info": {"episodes": [], "indx": [(int(a), int(b)) for a, b in spans]},
    }
    save_npy(folder / "lang_annotations" / "auto_lang_ann.npy", annotations)
    save_npy(folder / "ep_start_end_ids.npy", spans)


def write_statistics(folder: Path, vectors: dict[str, np.ndarray]) -> None:
    """Write statistics.yaml: mean and standard deviation of robot_obs and scene_obs, and bounds of the actions."""
    record: dict[str, Any] = {}
    for key in ("robot_obs", "scene_obs"):
        values = vectors[key]
        moments = {"mean": values.mean(0).tolist(), "std": values.std(0).tolist()}
        record[key] = [{"_target_": "calvin_agent.utils.transforms.NormalizeVector", **moments}]
    record["act_min_bound"] = vectors["actions"].min(0).tolist()
    record["act_max_bound"] = vectors["actions"].max(0).tolist()
    write_text(folder / "statistics.yaml", yaml.safe_dump(record, sort_keys=False))


def write_env_config(folder: Path, scenes: list[str], world: str, versions: dict[str, str]) -> None:
    """Write .hydra/merged_config.yaml: the environment of these frames, with the keys of CALVIN's own file."""
    config = {
        "world": world,
        "versions": versions,
        "scene": {"name": [f"calvin_scene_{scene}" for scene in scenes]},
        "cameras": {
            "static": {"name": "static", "width": 200, "height": 200, "fov": 10},
            "gripper": {"name": "gripper", "width": 84, "height": 84, "fov": 75},
        },
        "env": {"control_freq": CONTROL_FREQ},
        "robot": {"max_rel_pos": MAX_REL_POS, "max_rel_orn": MAX_REL_ORN, "euler_obs": True},
    }
    write_text(folder / ".hydra" / "merged_config.yaml", yaml.safe_dump(config, sort_keys=False))


def save_npy(path: Path, value: Any) -> None:
    """np.save, so that the file appears only when it is complete."""
    with atomic_path(path) as part:
        np.save(part, value, allow_pickle=True)
