"""Program: record scripted demonstrations in CALVIN's format, and as a video set (DESIGN 7, 10).

    python -m envs.record scene=A tasks=eleven episodes=1400 out=data/playtable/A workers=2
    python -m envs.record env=calvin scene=D ...      in the real CALVIN, where calvin_env is installed
    python -m envs.record env=playtable_hand scene=[A,B,C] tasks=eleven episodes=600 out=data/playtable/hand

The last films a person's hand: a video set of the static camera with sentences, without CALVIN's frames and without
motions.
Chain i of a scene depends on (seed, scene, i) alone, whatever the number of workers. A killed recording goes on with
the
same command.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from common.video_set import write_annotation
from envs.calvin.env import TabletopEnv
from envs.playtable.scene import SCENES
from envs.recording import writer as files
from envs.recording.demonstrate import demonstrate_chain
from envs.tasks import check_tasks

CONFIGS = str(Path(__file__).resolve().parents[1] / "configs")
MAX_RESTARTS = 3  # of the workers, where one is killed or its simulator or renderer crashes
MAX_EMPTY_CHAINS = 60  # chains without a single segment after which a scene is given up
DEFAULT_ENV = {"_target_": "envs.playtable.PlayTableEnv"}
log = logging.getLogger(__name__)
_envs: dict[str, TabletopEnv] = {}  # the simulator of each worker, by its scene


def _prepare_worker() -> None:
    # Several workers share the cores: the software renderer must not start threads of its own in each.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """After a kill -9 of the program nobody tells a worker that it is over."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _get_env(scene: str, env: dict[str, Any]) -> TabletopEnv:
    """This worker's simulator; one of another scene is closed first, for the real CALVIN's serves one in a process."""
    if scene not in _envs:
        while _envs:
            _envs.popitem()[1].close()
        settings = {key: value for key, value in env.items() if key not in ("_target_", "scene")}
        _envs[scene] = get_object(env["_target_"])(scene, **settings)
    return _envs[scene]


def record_chain(job: dict[str, Any]) -> dict[str, Any]:
    """Demonstrate chain `job["number"]` into its own folder (renamed when whole) and return its summary."""
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
            files.write_frames(partial / str(index), segment)
        if job["videos"]:
            files.write_videos(partial / str(index), segment, cameras=2 if job["actions"] else 1)
    summary = {
        "folder": done.name,
        "scene": job["scene"],
        "number": job["number"],
        "failed": failed,
        "world": env.name.rsplit("-", 1)[0],
        "versions": env.versions(),
        "segments": [{"task": s.task, "sentence": s.instruction, "length": len(s)} for s in segments],
    }
    (partial / "summary.json").write_text(json.dumps(summary))
    shutil.rmtree(done, ignore_errors=True)
    os.replace(partial, done)
    return summary


def record(
    *,
    scenes: list[str],
    tasks: list[str],
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
    """Record `episodes` segments, equally over `scenes`, and return the counts.

    Without `actions` only the video set is written, of the static camera, as a person is filmed; None records them
    where the world shows
    a robot, and leaves them out where it shows a hand.
    `env` names the world by its `_target_` and its further arguments; None is playtable. Raises ValueError for bad
    arguments and for an
    `out` that holds another recording, RuntimeError where a scene gives none of the tasks or the simulator does not
    start.
    """
    _check(scenes, tasks, {"episodes": episodes, "workers": workers}, length, validation_fraction)
    env = env or DEFAULT_ENV
    if actions is None:
        actions = env.get("embodiment") != "hand"
    if not actions and not videos:
        raise ValueError("videos=false without actions records nothing: set videos=true")
    parts = out / ".parts"
    if ((out / "training" / "ep_start_end_ids.npy").is_file() or (out / "videos_set").is_dir()) and not parts.is_dir():
        raise ValueError(f"{out} already holds a recording: choose another out= or delete it")
    settings = {
        "scenes": scenes,
        "tasks": list(tasks),
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
        raise ValueError(
            f"{out} holds an unfinished recording with other settings ({known}): repeat those, "
            f"choose another out= or delete it"
        )
    files.write_text(known, json.dumps(settings))
    for restarts in count():
        try:
            chains = _record_scenes(settings, parts, workers)
            break
        except BrokenProcessPool:
            if restarts == MAX_RESTARTS:
                raise RuntimeError(
                    f"a worker died for the {restarts + 1}th time; run the same command again, finished chains are kept"
                ) from None
            log.warning("a worker died; going on with new ones, finished chains are kept")
    if actions:
        counts = _assemble_dataset(chains, out, validation_fraction, videos=videos)
    else:
        counts = _assemble_videos(chains, out, validation_fraction)
    finished = parts.with_name(".parts.done")
    os.replace(parts, finished)
    shutil.rmtree(finished)
    return counts


def _record_scenes(settings: dict[str, Any], parts: Path, workers: int) -> list[dict[str, Any]]:
    """The summaries of all chains of all scenes; what an earlier attempt finished is only read."""
    chains, scenes, episodes = [], settings["scenes"], settings["episodes"]
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_prepare_worker) as pool:
        try:
            for order, scene in enumerate(scenes):
                share = episodes // len(scenes) + (order < episodes % len(scenes))
                job = {**settings, "scene": scene, "parts": str(parts)}
                chains += _record_scene(_in_order(pool, job, prefetch=2 * workers), scene, share)
        finally:
            # the pool would wait for chains that nobody needs any more, minutes where pictures are slow
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
    return chains


def _check(scenes: list[str], tasks: list[str], sizes: dict[str, int], length: int, validation_fraction: float) -> None:
    check_tasks(tasks)
    if not tasks:
        raise ValueError("tasks is empty: name a set (all, eleven) or a list of tasks")
    if not scenes or set(scenes) - set(SCENES) or len(set(scenes)) < len(scenes):
        raise ValueError(f"scene={scenes}: choose among {', '.join(SCENES)}, each once")
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value}: give 1 or more")
    if not 1 <= length <= 5:
        raise ValueError(f"length={length}: a chain holds 1 to 5 segments")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction}: give a share of 0 up to, not including, 1")


def _in_order(pool: ProcessPoolExecutor, job: dict[str, Any], *, prefetch: int) -> Iterator[dict[str, Any]]:
    """Summaries of chains 0, 1, 2, ... of a scene; no more than `prefetch` are under way, unneeded ones are called off."""
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
    """Chains in the order of their numbers until `share` segments are there; the last is cut to fit."""
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
                raise RuntimeError(
                    f"scene {scene}: {MAX_EMPTY_CHAINS} chains gave no segment; are these tasks possible there?"
                )
    summaries.close()
    return chains


def _check_same_versions(summary: dict[str, Any], before: list[dict[str, Any]]) -> None:
    """A recording that went on elsewhere must not mix the pictures of two renderers. A chain without segments drew
    none."""
    first = next((chain for chain in before if chain["segments"]), summary)
    if summary["segments"] and summary["versions"] != first["versions"]:
        differ = ", ".join(
            f"{key}: {first['versions'].get(key)} there, {value} here"
            for key, value in summary["versions"].items()
            if value != first["versions"].get(key)
        )
        raise RuntimeError(
            f"chain {summary['folder']} was not recorded like {first['folder']} ({differ}): "
            f"choose another out= or delete .parts in it to begin anew"
        )


def _validation_folders(chains: list[dict[str, Any]], share: float) -> set[str]:
    """Folders of the chains for validation: evenly spread, at least one where there are two chains and a share."""
    number = max(1, round(share * len(chains))) if share and len(chains) > 1 else 0
    return {chains[int((k + 0.5) * len(chains) / number)]["folder"] for k in range(number)}


def _assemble_dataset(chains: list[dict[str, Any]], out: Path, share: float, *, videos: bool) -> dict[str, Any]:
    """Move the frames of all chains under consecutive ids, training first. Safe to repeat after a kill."""
    held_out = _validation_folders(chains, share)
    tasks, first = Counter[str](), 0
    drawn = next(summary for summary in chains if summary["segments"])
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
                        texts=[segment["sentence"]],
                        num_cameras=2,
                        length=segment["length"],
                        fps=files.FPS,
                        scene=scene,
                        states=vectors[-1]["robot_obs"],
                        task="robot_trajectory_prediction",
                    )
                episodes.append({"start": first, "end": last, **segment})
                scenes.setdefault(scene, [first, last])[1] = last
                first = last + 1
        tasks.update(episode["task"] for episode in episodes)
        if episodes:
            files.write_statistics(target, {key: np.concatenate([v[key] for v in vectors]) for key in vectors[0]})
        files.write_env_config(
            target, sorted({summary["scene"] for summary in chosen}), drawn["world"], drawn["versions"]
        )
        files.write_split(target, episodes, scenes)
    return _counts(chains, tasks, first)


def _assemble_videos(chains: list[dict[str, Any]], out: Path, share: float) -> dict[str, Any]:
    """The video set alone, of the static camera. Safe to repeat after a kill."""
    held_out = _validation_folders(chains, share)
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
                texts=[segment["sentence"]],
                num_cameras=1,
                length=segment["length"],
                fps=files.FPS,
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
    """Rename a segment's frames and return its vectors; what an earlier, killed assembly moved is left alone."""
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


@hydra.main(version_base=None, config_path=CONFIGS, config_name="playtable_record")
def main(cfg: DictConfig) -> None:
    # An end by SIGTERM must take the workers along, like one by Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    scenes = [cfg.scene] if isinstance(cfg.scene, str) else list(cfg.scene)
    out = Path(cfg.out)
    try:
        counts = record(
            scenes=scenes,
            tasks=list(cfg.tasks.tasks),
            episodes=cfg.episodes,
            out=out,
            env=OmegaConf.to_container(cfg.env, resolve=True),
            length=cfg.length,
            workers=cfg.workers,
            seed=cfg.seed,
            validation_fraction=cfg.validation_fraction,
            videos=cfg.videos,
            actions=cfg.actions,
        )
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    summary = {**counts, "config": OmegaConf.to_container(cfg)}
    files.write_text(out / "recording.json", json.dumps(summary, indent=2) + "\n")
    log.info(
        "%d episodes, %d frames, %d failed attempts dropped; results in %s",
        counts["episodes"],
        counts["frames"],
        counts["failed"],
        out,
    )


if __name__ == "__main__":
    # `tasks` is a config group, whose values Hydra would look up as files; a list means itself
    sys.argv[1:] = [re.sub(r"^tasks=\[", "tasks.tasks=[", argument) for argument in sys.argv[1:]]
    main()
