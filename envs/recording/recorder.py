"""Record demonstrations with several workers: chains of segments, assembled into CALVIN's dataset and a video set.

Chain i of a scene depends on (seed, scene, i) only, so the result does not depend on the number of workers. Each worker
writes a finished chain into a folder of its own under <out>/.parts. After a kill, the same call continues with the
chains that are missing, and `_assemble_dataset` may be repeated.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import get_object

from common import workers as processes
from common.errors import OutputExistsError, UserError
from common.files import write_text
from common.progress import tqdm
from common.video_set import write_annotation
from envs.calvin.env import TabletopEnv
from envs.playtable.scene import SCENES
from envs.protocol import CONTROL_FREQ
from envs.recording import writer
from envs.recording.demonstrate import demonstrate_chain
from envs.tasks import resolve_tasks

MAX_RESTARTS = 3  # of the workers, if one is killed or if its simulator or renderer crashes
MAX_EMPTY_CHAINS = 60  # a scene is given up if its first chains yield no segment at all
DEFAULT_ENV = {"_target_": "envs.playtable.PlayTableEnv"}
log = logging.getLogger(__name__)
_envs: dict[str, TabletopEnv] = {}  # scene -> the environment of this worker


def _prepare_worker() -> None:
    # The workers share the cores, so the software renderer must not start threads of its own in each of them.
    os.environ.setdefault("LP_NUM_THREADS", "1")


def _get_env(scene: str, env: dict[str, Any]) -> TabletopEnv:
    """The environment of this worker. One of another scene is closed first: calvin_env allows one in a process."""
    if scene not in _envs:
        while _envs:
            _envs.popitem()[1].close()
        settings = {key: value for key, value in env.items() if key not in ("_target_", "scene")}
        _envs[scene] = get_object(env["_target_"])(scene, **settings)
    return _envs[scene]


def record_chain(job: dict[str, Any]) -> dict[str, Any]:
    """Demonstrate chain `job["number"]`, write it into a folder of its own and return its summary.

    The folder is renamed to its final name once it is complete. A chain that is there already is only read.
    """
    done = Path(job["parts"]) / f"{job['scene']}_{job['number']:06d}"
    if (done / "summary.json").is_file():
        return json.loads((done / "summary.json").read_text())
    env = _get_env(job["scene"], job["env"])
    segments, failed = demonstrate_chain(env, job["tasks"], job["length"], seed=job["seed"], number=job["number"])
    partial = done.with_name(f".{done.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for index, segment in enumerate(segments):
        if job["actions"]:
            writer.write_frames(partial / str(index), segment)
        if job["videos"]:
            writer.write_videos(partial / str(index), segment, cameras=2 if job["actions"] else 1)
    summary = {
        "folder": done.name,
        "scene": job["scene"],
        "number": job["number"],
        "failed": failed,
        "world": env.name.rsplit("-", 1)[0],
        "versions": env.versions(),
        "segments": [{"task": s.task, "instruction": s.instruction, "length": len(s)} for s in segments],
    }
    write_text(partial / "summary.json", json.dumps(summary))
    shutil.rmtree(done, ignore_errors=True)
    os.replace(partial, done)
    return summary


def record(
    *,
    scenes: list[str],
    tasks: str | list[str],
    episodes: int,
    out: Path,
    env: dict[str, Any] | None = None,
    length: int = 5,
    workers: int = 2,
    seed: int = 0,
    validation_fraction: float = 0.05,
    videos: bool = False,
    actions: bool | None = None,
) -> dict[str, Any]:
    """Record `episodes` segments, divided equally among `scenes`, and return the counts.

    tasks: the name of a set or a list of tasks, see `envs.tasks.resolve_tasks`. env: the `_target_` of the environment
    and its other arguments, None for playtable. length: the largest number of segments in a chain, 1 to 5.
    validation_fraction: the part of the chains that is held out. actions: whether CALVIN's frames with actions are
    written; without them only the video set of the static camera is written, as a person is filmed. None writes them
    unless the environment shows a person's hand.

    Raises UserError for bad arguments, for an `out` that holds another recording, for a scene that yields no segment,
    and if the workers keep dying; RenderError or CalvinError if the simulator does not start.
    """
    tasks = list(resolve_tasks(tasks))
    _check(scenes, {"episodes": episodes, "workers": workers}, length, validation_fraction)
    env = env or DEFAULT_ENV
    if actions is None:
        actions = env.get("embodiment") != "hand"
    if not actions and not videos:
        raise UserError("videos=false without actions would record nothing: set videos=true")
    parts = out / ".parts"
    if ((out / "training" / "ep_start_end_ids.npy").is_file() or (out / "videos_set").is_dir()) and not parts.is_dir():
        raise OutputExistsError(f"{out} already holds a recording: choose another out= or delete it")
    settings = {
        "scenes": scenes,
        "tasks": tasks,
        "episodes": episodes,
        "length": length,
        "seed": seed,
        "videos": videos,
        "validation_fraction": validation_fraction,
        "env": env,
        "actions": actions,
    }
    known = parts / "settings.json"
    if known.is_file() and json.loads(known.read_text()) != settings:
        raise OutputExistsError(
            f"{out} holds an unfinished recording with other settings ({known}): repeat those settings, "
            "choose another out= or delete it"
        )
    write_text(known, json.dumps(settings))
    for restarts in count():
        try:
            chains = _record_scenes(settings, parts, workers)
            break
        except BrokenProcessPool:
            if restarts == MAX_RESTARTS:
                raise UserError(
                    f"a worker died for the {restarts + 1}th time, perhaps for lack of memory (fewer workers= need "
                    "less); run the same command again, the finished chains are kept"
                ) from None
            log.warning("a worker died; the recording continues with new workers and keeps the finished chains")
    if actions:
        counts = _assemble_dataset(chains, out, validation_fraction, videos=videos)
    else:
        counts = _assemble_videos(chains, out, validation_fraction)
    finished = parts.with_name(".parts.done")
    os.replace(parts, finished)
    shutil.rmtree(finished)
    return counts


def _check(scenes: list[str], sizes: dict[str, int], length: int, validation_fraction: float) -> None:
    if not scenes or set(scenes) - set(SCENES) or len(set(scenes)) < len(scenes):
        raise UserError(f"scene={scenes}: choose among {', '.join(SCENES)}, each once")
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name}={value}: give 1 or more")
    if not 1 <= length <= 5:
        raise UserError(f"length={length}: a chain holds 1 to 5 segments")
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction={validation_fraction}: give a number from 0 up to, but not including, 1")


def _record_scenes(settings: dict[str, Any], parts: Path, workers: int) -> list[dict[str, Any]]:
    """The summaries of all chains of all scenes. Chains that an earlier attempt finished are only read."""
    chains, scenes, episodes = [], settings["scenes"], settings["episodes"]
    others = set(multiprocessing.active_children())
    with processes.pool(workers, _prepare_worker) as pool:
        try:
            for order, scene in enumerate(scenes):
                share = episodes // len(scenes) + (order < episodes % len(scenes))
                job = {**settings, "scene": scene, "parts": str(parts)}
                chains += _record_scene(_in_order(pool, job, prefetch=2 * workers), scene, share)
        finally:
            # Without this, the pool would wait for chains that are not needed, for minutes where rendering is slow.
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
    return chains


def _in_order(pool: ProcessPoolExecutor, job: dict[str, Any], *, prefetch: int) -> Iterator[dict[str, Any]]:
    """Summaries of chains 0, 1, 2, ... of a scene. At most `prefetch` chains are submitted at a time.

    Chains that have not begun when the generator is closed are cancelled.
    """
    waiting: deque[Future] = deque()
    try:
        for number in count():
            waiting.append(pool.submit(record_chain, {**job, "number": number}))
            if len(waiting) == prefetch:
                yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _record_scene(summaries: Iterator[dict[str, Any]], scene: str, share: int) -> list[dict[str, Any]]:
    """Chains in the order of their numbers until they hold `share` segments; the last one is cut to fit."""
    chains: list[dict[str, Any]] = []
    have = 0
    with tqdm(total=share, desc=f"scene {scene}", unit="episode", mininterval=1) as bar:
        while have < share:
            summary = next(summaries)
            _check_same_versions(summary, chains)
            summary["segments"] = summary["segments"][: share - have]
            have += len(summary["segments"])
            bar.update(len(summary["segments"]))
            chains.append(summary)
            if have == 0 and len(chains) == MAX_EMPTY_CHAINS:
                raise UserError(
                    f"scene {scene}: {MAX_EMPTY_CHAINS} chains yielded no segment; check that tasks= are possible there"
                )
    summaries.close()
    return chains


def _check_same_versions(summary: dict[str, Any], chains: list[dict[str, Any]]) -> None:
    """Raise UserError if a recording continues with another simulator or renderer, whose images look different.

    Chains without segments are not compared, because their environment may not have rendered anything yet.
    """
    first = next((chain for chain in chains if chain["segments"]), summary)
    if summary["segments"] and summary["versions"] != first["versions"]:
        differ = ", ".join(
            f"{key}: {first['versions'].get(key)} there, {value} here"
            for key, value in summary["versions"].items()
            if value != first["versions"].get(key)
        )
        raise UserError(
            f"chain {summary['folder']} was not recorded with the same versions as {first['folder']} ({differ}): "
            "choose another out= or delete .parts in it to begin again"
        )


def _validation_folders(chains: list[dict[str, Any]], fraction: float) -> set[str]:
    """Folders of the chains for validation: evenly spread, and at least one if there are two chains and a fraction."""
    number = max(1, round(fraction * len(chains))) if fraction and len(chains) > 1 else 0
    return {chains[int((k + 0.5) * len(chains) / number)]["folder"] for k in range(number)}


def _assemble_dataset(chains: list[dict[str, Any]], out: Path, fraction: float, *, videos: bool) -> dict[str, Any]:
    """Move the frames of all chains under consecutive ids, training first. May be repeated after a kill."""
    held_out = _validation_folders(chains, fraction)
    tasks, first = Counter[str](), 0
    rendered = next(summary for summary in chains if summary["segments"])
    for split, folder in (("train", "training"), ("val", "validation")):
        chosen = [summary for summary in chains if (summary["folder"] in held_out) == (split == "val")]
        target, episodes, vectors = out / folder, [], []
        scenes: dict[str, list[int]] = {}
        target.mkdir(parents=True, exist_ok=True)
        for summary in chosen:
            scene = f"calvin_scene_{summary['scene']}"
            for index, segment in enumerate(summary["segments"]):
                source, last = out / ".parts" / summary["folder"] / str(index), first + segment["length"] - 1
                vectors.append(_move_frames(source, target, first, segment["length"]))
                if videos:
                    name = f"{len(episodes):06d}"
                    _move_videos(source, out / "videos_set", f"{split}/{name}")
                    write_annotation(
                        out / "videos_set",
                        split,
                        name,
                        texts=[segment["instruction"]],
                        num_cameras=2,
                        length=segment["length"],
                        fps=CONTROL_FREQ,
                        scene=scene,
                        states=vectors[-1]["robot_obs"],
                        task="robot_trajectory_prediction",
                    )
                episodes.append({"start": first, "end": last, **segment})
                scenes.setdefault(scene, [first, last])[1] = last
                first = last + 1
        tasks.update(episode["task"] for episode in episodes)
        if episodes:
            writer.write_statistics(target, {key: np.concatenate([v[key] for v in vectors]) for key in vectors[0]})
        writer.write_env_config(
            target, sorted({summary["scene"] for summary in chosen}), rendered["world"], rendered["versions"]
        )
        writer.write_split(target, episodes, scenes)
    return _counts(chains, tasks, first)


def _assemble_videos(chains: list[dict[str, Any]], out: Path, fraction: float) -> dict[str, Any]:
    """Write the video set of the static camera and nothing else. May be repeated after a kill."""
    held_out = _validation_folders(chains, fraction)
    tasks, frames, numbers = Counter[str](), 0, Counter[str]()
    for summary in chains:
        split = "val" if summary["folder"] in held_out else "train"
        for index, segment in enumerate(summary["segments"]):
            name = f"{numbers[split]:06d}"
            _move_videos(out / ".parts" / summary["folder"] / str(index), out / "videos_set", f"{split}/{name}")
            write_annotation(
                out / "videos_set",
                split,
                name,
                texts=[segment["instruction"]],
                num_cameras=1,
                length=segment["length"],
                fps=CONTROL_FREQ,
                scene=f"calvin_scene_{summary['scene']}",
                task="human_video_prediction",
            )
            numbers[split] += 1
            tasks[segment["task"]] += 1
            frames += segment["length"]
    return _counts(chains, tasks, frames)


def _counts(chains: list[dict[str, Any]], tasks: Counter[str], frames: int) -> dict[str, Any]:
    failed = sum(summary["failed"] for summary in chains)
    return {"episodes": sum(tasks.values()), "frames": frames, "failed": failed, "tasks": dict(sorted(tasks.items()))}


def _move_frames(source: Path, target: Path, first: int, length: int) -> dict[str, np.ndarray]:
    """Rename the frames of a segment and return its vectors. Frames that an earlier attempt moved are skipped."""
    for offset in range(length):
        frame = source / f"{offset:05d}.npz"
        if frame.is_file():
            os.replace(frame, target / f"episode_{first + offset:07d}.npz")
    with np.load(source / "vectors.npz") as archive:
        return dict(archive)


def _move_videos(source: Path, root: Path, name: str) -> None:
    target = root / "videos" / name
    target.mkdir(parents=True, exist_ok=True)
    for camera in (0, 1):
        if (source / f"{camera}.mp4").is_file():
            os.replace(source / f"{camera}.mp4", target / f"{camera}.mp4")
