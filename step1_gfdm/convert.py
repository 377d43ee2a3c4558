"""Program: data sets as published -> video sets (A.2).   python -m step1_gfdm.convert source=bridge in=<folder>
out=<set>

    <out>/annotation/{train,val}/<id>.json     texts, videos[].video_path, episode_id, video_length, fps[, state, scene]
    <out>/videos/{train,val}/<id>/<camera>.mp4

The annotation is written last: with it, an episode is whole. What is there is skipped, so a stopped run goes on.
Processes of
accelerate launch share the episodes, and each spreads its own over `workers`.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from common import video
from common.calvin_format import CalvinFormatError
from common.errors import UserError
from common.files import write_text
from common.mixture import FilteredSample, UnreadableSample
from common.program import program
from common.rlds import RldsError
from common.video_set import finished_length, write_annotation
from common.workers import pool
from step1_gfdm.sources import FILTER_REASONS, Camera, EpisodeEntry, Source

BAD = (UnreadableSample, video.VideoError, RldsError, CalvinFormatError)
MIN_EPISODES = 20  # episodes before a share of bad ones says anything
FINE = ("converted", "already there", *FILTER_REASONS)
log = logging.getLogger(__name__)
_source: dict[str, Source] = {}  # one a worker


def convert(
    source: Source,
    out: Path,
    *,
    image_size: int = 256,
    aspect: str = "squeeze",
    gop: int = 8,
    crf: int = 18,
    limit: int | None = None,
    workers: int = 1,
    max_unreadable_fraction: float = 0.1,
    rank: int = 0,
    world: int = 1,
) -> Counter:
    """Write the episodes of a source as a video set; returns how many ended how, and "frames".

    limit: only the first so many usable episodes of each split. max_unreadable_fraction: the share of unreadable episodes at
    which the run
    stops; what a source leaves out by rule (FILTER_REASONS) does not count.
    """
    options = {"image_size": image_size, "aspect": aspect, "gop": gop, "crf": crf}
    listed = _unique(source.episodes())
    counts = Counter(entry.reason for entry in listed if entry.reason) if rank == 0 else Counter()
    usable = [entry for entry in listed if not entry.reason]
    if limit is not None:
        by_split = {
            split: [entry for entry in usable if entry.split == split]
            for split in sorted({entry.split for entry in usable})
        }
        usable = [entry for entries in by_split.values() for entry in entries[:limit]]
    unusable = [entry for entry in listed if entry.reason and entry.reason not in FILTER_REASONS]
    for entry in unusable if rank == 0 else ():
        tqdm.write(f"skipped: {entry.id}: {entry.reason}")
    _check_unreadable_fraction(len(unusable), len(listed), max_unreadable_fraction, out)
    _remember(out, options)
    mine, bad = usable[rank::world], 0
    with tqdm(total=len(mine), desc=f"convert {out.name}", unit="episode", disable=rank != 0) as bar:
        for done, (ending, frames, message) in enumerate(_run(source, out, mine, options, workers), start=1):
            counts[ending] += 1
            counts["frames"] += frames
            bar.update()
            if ending not in FINE:
                bad += 1
                tqdm.write(f"skipped: {message}")
                if done >= MIN_EPISODES:
                    _check_unreadable_fraction(bad, done, max_unreadable_fraction, out)
    _check_unreadable_fraction(bad, len(mine), max_unreadable_fraction, out)
    return counts


def _run(
    source: Source, out: Path, listed: list[EpisodeEntry], options: dict[str, Any], workers: int
) -> Iterator[tuple[str, int, str]]:
    if workers <= 1:
        for entry in listed:
            yield _one(source, out, entry, options)
        return
    with pool(workers, _prepare, source) as processes:
        jobs, waiting = iter(listed), []
        try:
            waiting = [processes.submit(_job, out, entry, options) for entry in islice(jobs, 2 * workers)]
            while waiting:
                yield waiting.pop(0).result()
                waiting += [processes.submit(_job, out, entry, options) for entry in islice(jobs, 1)]
        finally:
            for future in waiting:
                future.cancel()


def _prepare(source: Source) -> None:
    torch.set_num_threads(1)  # the cores belong to the other workers
    _source["it"] = source


def _job(out: Path, entry: EpisodeEntry, options: dict[str, Any]) -> tuple[str, int, str]:
    return _one(_source["it"], out, entry, options)


def _one(source: Source, out: Path, entry: EpisodeEntry, options: dict[str, Any]) -> tuple[str, int, str]:
    """How one episode ended, its frames, and what to say about it."""
    name = _file_name(entry.id)
    there = finished_length(out, entry.split, name)
    if there:
        return "already there", there, ""
    try:
        episode = source.read(entry)
        folder = Path("videos") / entry.split / name
        lengths = [
            _write(camera, out / folder / f"{number}.mp4", **options) for number, camera in enumerate(episode.cameras)
        ]
        if len(set(lengths)) != 1:
            raise UnreadableSample(entry.id, f"its cameras have {lengths} frames")
    except BAD as error:
        return error.reason if isinstance(error, FilteredSample) else "unreadable", 0, str(error)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"{out}: the disk is full; free space and run the same command, finished episodes are kept"
            ) from error
        raise
    write_annotation(
        out,
        entry.split,
        name,
        texts=episode.texts,
        num_cameras=len(lengths),
        length=lengths[0],
        fps=episode.cameras[0].fps,
        scene=episode.scene,
        states=episode.state,
        episode_id=entry.id,
    )
    return "converted", lengths[0], ""


def _write(camera: Camera, path: Path, *, image_size: int, aspect: str, gop: int, crf: int) -> int:
    """One camera as mp4; only the small frames are held."""
    small = [
        (video.resize(frames, image_size, aspect) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for frames in camera.batches
    ]
    if not small:
        raise UnreadableSample(str(path), "no frames")
    video.write_mp4(path, np.concatenate(small), camera.fps or 1.0, gop=gop, crf=crf)
    return camera.length


def _unique(listed: list[EpisodeEntry]) -> list[EpisodeEntry]:
    """Later episodes under a name that is taken, marked so."""
    taken: set[tuple[str, str]] = set()
    result = []
    for entry in listed:
        key = (entry.split, _file_name(entry.id))
        if not entry.reason and key in taken:
            entry = EpisodeEntry(entry.id, entry.split, "id taken by another episode")
        taken.add(key)
        result.append(entry)
    return result


def _file_name(id: str) -> str:
    return re.sub(r"[^\w.-]+", "_", id).lstrip(".") or "_"


def _check_unreadable_fraction(bad: int, of: int, limit: float, out: Path) -> None:
    if of and bad / of > limit:
        raise UserError(
            f"{bad} of {of} episodes are unreadable, more than max_unreadable_fraction={limit}: see the reasons above, or raise "
            "it; "
            f"what was converted stays in {out}"
        )


def _remember(out: Path, options: dict[str, Any]) -> None:
    """A set is of one size: refuse to mix."""
    file = out / "convert.json"
    if file.is_file():
        known = json.loads(file.read_text())
        if known != options:
            raise UserError(f"{out} was converted with {known}, now {options} is asked for; choose another out=")
    else:
        write_text(file, json.dumps(options) + "\n")


@program("step1_convert")
def main(cfg: DictConfig) -> None:
    state = PartialState(cpu=True)
    out = Path(cfg.out)
    source = instantiate(OmegaConf.to_container(cfg.source, resolve=True), root=cfg.root)
    counts = convert(
        source,
        out,
        image_size=cfg.image_size,
        aspect=cfg.aspect,
        gop=cfg.gop,
        crf=cfg.crf,
        limit=cfg.limit,
        workers=cfg.workers,
        max_unreadable_fraction=cfg.max_unreadable_fraction,
        rank=state.process_index,
        world=state.num_processes,
    )
    log.info("process %d: %s", state.process_index, ", ".join(f"{n} {ending}" for ending, n in sorted(counts.items())))
    log.info("video set in %s; its latents: scripts/step1_prepare_data_latent.sh data=%s", out, out)


if __name__ == "__main__":
    # `in` would read as a keyword of Python in the config
    sys.argv[1:] = [re.sub(r"^in=", "root=", argument) for argument in sys.argv[1:]]
    main()
