"""Program: record scripted demonstrations in CALVIN's format, and as a video set (DESIGN 7, 10).

    python -m playtable.record scene=A tasks=eleven episodes=600 out=data/playtable/A workers=2

Chain i depends on (seed, scene, i) alone, whatever the number of workers. A killed recording goes on with the same command.
"""
from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from playtable import calvin_files as files
from playtable.demonstrate import chain
from playtable.env import PlayTable
from playtable.tasks import check_tasks

CONFIGS = str(Path(__file__).resolve().parents[1] / "configs")
log = logging.getLogger(__name__)
_worlds: dict[str, PlayTable] = {}  # one simulator a scene in each worker


def record_chain(job: dict[str, Any]) -> dict[str, Any]:
    """Demonstrate chain `job["number"]` into its own folder (renamed when whole) and return its summary."""
    done = Path(job["parts"]) / f"{job['scene']}_{job['number']:06d}"
    if (done / "summary.json").is_file():
        return json.loads((done / "summary.json").read_text())
    if job["scene"] not in _worlds:
        _worlds[job["scene"]] = PlayTable(scene=job["scene"])
    env = _worlds[job["scene"]]
    rng = np.random.default_rng((job["seed"], "ABCD".index(job["scene"]), job["number"]))
    segments, failed = chain(env, job["tasks"], job["length"], rng)
    beside = done.with_name(f".{done.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for index, segment in enumerate(segments):
        files.write_frames(beside / str(index), segment)
        if job["videos"]:
            files.write_films(beside / str(index), segment)
    summary = {"folder": str(done), "scene": job["scene"], "number": job["number"], "failed": failed,
               "segments": [{"task": s.task, "sentence": s.sentence, "length": len(s)} for s in segments]}
    (beside / "summary.json").write_text(json.dumps(summary))
    shutil.rmtree(done, ignore_errors=True)
    os.replace(beside, done)
    return summary


def record(*, scenes: list[str], tasks: list[str], episodes: int, out: Path, length: int, workers: int, seed: int,
           validation_share: float, videos: bool) -> dict[str, Any]:
    """Record `episodes` segments, equally over `scenes`, and return the counts. Raises ValueError for bad arguments."""
    check_tasks(tasks)
    if not scenes or set(scenes) - set("ABCD"):
        raise ValueError(f"scene={scenes}: scenes are A, B, C and D")
    if (out / "training" / "ep_start_end_ids.npy").is_file():
        raise ValueError(f"{out} already holds a recording; choose another out= or delete it")
    parts = out / ".parts"
    settings = {"scenes": scenes, "tasks": list(tasks), "length": length, "seed": seed, "videos": videos}
    known = parts / "settings.json"
    if known.is_file() and json.loads(known.read_text()) != settings:
        raise ValueError(f"{out} holds an unfinished recording with other settings ({known}); choose another out= or delete it")
    files.write_text(known, json.dumps(settings))
    chains = []
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for order, scene in enumerate(scenes):
            share = episodes // len(scenes) + (order < episodes % len(scenes))
            chains += _record_scene(pool, scene, share, settings, parts)
    return _assemble(chains, out, validation_share, videos)


def _record_scene(pool: Any, scene: str, share: int, settings: dict[str, Any], parts: Path) -> list[dict[str, Any]]:
    """Chains in the order of their numbers until `share` segments are there; the last is cut to fit."""
    jobs = ({**settings, "scene": scene, "parts": str(parts), "number": number} for number in range(20 * share + 20))
    chains, have = [], 0
    with tqdm(total=share, desc=f"scene {scene}", unit="episode", mininterval=1) as bar:
        for summary in pool.imap(record_chain, jobs):
            summary["segments"] = summary["segments"][:share - have]
            have += len(summary["segments"])
            bar.update(len(summary["segments"]))
            chains.append(summary)
            if have >= share:
                return chains
    raise RuntimeError(f"scene {scene}: {len(chains)} chains gave only {have} of {share} segments; are these tasks possible there?")


def _assemble(chains: list[dict[str, Any]], out: Path, validation_share: float, videos: bool) -> dict[str, Any]:
    """Move the frames of all chains under consecutive ids. Whole chains are held out for validation."""
    every = max(2, round(1 / validation_share)) if validation_share else None
    counts: dict[str, Any] = {"episodes": 0, "frames": 0, "failed": sum(c["failed"] for c in chains), "tasks": {}}
    frame = 0
    for split, folder in (("train", "training"), ("val", "validation")):
        target, episodes, scenes, vectors = out / folder, [], {}, {key: [] for key in files.VECTORS}
        target.mkdir(parents=True, exist_ok=True)
        for summary in [c for c in chains if (bool(every) and c["number"] % every == every - 1) == (split == "val")]:
            for index, segment in enumerate(summary["segments"]):
                name = f"{summary['scene']}{summary['number']:06d}_{index}"
                start, source = frame, Path(summary["folder"]) / str(index)
                for offset in range(segment["length"]):
                    _move(source / f"{offset:05d}.npz", target / f"episode_{frame:07d}.npz")
                    with np.load(target / f"episode_{frame:07d}.npz") as archive:
                        for key, rows in vectors.items():
                            rows.append(archive[key])
                    frame += 1
                if videos:
                    for camera in (0, 1):
                        _move(source / f"{camera}.mp4", out / "videos_set" / "videos" / split / name / f"{camera}.mp4")
                    files.write_annotation(out / "videos_set", split, name, segment["sentence"], segment["length"])
                episodes.append({"start": start, "end": frame - 1, **segment})
                span = scenes.setdefault(f"calvin_scene_{summary['scene']}", [start, frame - 1])
                span[1] = frame - 1
                counts["tasks"][segment["task"]] = counts["tasks"].get(segment["task"], 0) + 1
        if episodes:
            files.write_statistics(target, {key: np.array(rows) for key, rows in vectors.items()})
        files.write_split(target, episodes, scenes)
        counts["episodes"] += len(episodes)
    counts["frames"] = frame
    shutil.rmtree(out / ".parts")
    return counts


def _move(source: Path, target: Path) -> None:
    """Rename; a move that an earlier, killed assembly already made is left alone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_file() or not target.is_file():
        os.replace(source, target)


@hydra.main(version_base=None, config_path=CONFIGS, config_name="playtable_record")
def main(cfg: DictConfig) -> None:
    scenes = [cfg.scene] if isinstance(cfg.scene, str) else list(cfg.scene)
    counts = record(scenes=scenes, tasks=list(cfg.tasks.tasks), episodes=cfg.episodes, out=Path(cfg.out), length=cfg.length, workers=cfg.workers,
                    seed=cfg.seed, validation_share=cfg.validation_share, videos=cfg.videos)
    (Path(cfg.out) / "recording.json").write_text(json.dumps({**counts, "config": OmegaConf.to_container(cfg)}, indent=2) + "\n")
    log.info("%d episodes, %d frames, %d failed attempts dropped, in %s", counts["episodes"], counts["frames"], counts["failed"], cfg.out)


if __name__ == "__main__":
    # `tasks` is a config group, whose values Hydra would look up as files; a list means itself
    sys.argv[1:] = [re.sub(r"^tasks=\[", "tasks.tasks=[", argument) for argument in sys.argv[1:]]
    main()
